"""A Hugging Face Hub on this machine, for tests: real HTTP on loopback, for the real `huggingface_hub` client.

```python
with serve(folder) as hub:                     # or: python -m tests.hub FOLDER --port 5564
    with Process(hub.environment(home, "alice")) as user:   # its own HF_HOME, HF_ENDPOINT and token
        user.call("tests.hub.actions", "push", ...)
```

Everything is kept in `folder` (one JSON file and content-addressed blobs), so a server that was killed comes back as it
was. The token `hf_NAME` is that of user NAME, `hf_NAME.read` may only read.
"""

from .process import Process
from .server import LocalHub, serve

__all__ = ["LocalHub", "Process", "serve"]
