"""`python -m hf_compress` is `hf-compress`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
