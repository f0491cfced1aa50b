"""What the rules of `shrink` cannot know about a type."""

from __future__ import annotations

from typing import Any

# type -> class, where the first mapping would give one that is no good
CLASSES: dict[str, str] = {}
# type -> values that replace those of the shrunk config
OVERRIDES: dict[str, dict[str, Any]] = {}
# type -> why it is not built at all
SKIPPED: dict[str, str] = {}
