"""A Hub that stays: `python -m tests.hub FOLDER --port 5564`."""

import argparse
import threading

from .server import serve

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="where everything is kept")
parser.add_argument("--port", type=int, default=5564)
options = parser.parse_args()
with serve(options.folder, options.port) as hub:
    print(f"export HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_me", flush=True)
    threading.Event().wait()
