"""The command line. Nothing heavy is imported at the top of its files: arguments are parsed first."""

from .program import main

__all__ = ["main"]
