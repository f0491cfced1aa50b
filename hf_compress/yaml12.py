"""YAML as recipes and cards mean it, which is YAML 1.2: PyYAML alone reads YAML 1.1, where `no` (Norwegian) is False,
`3e-5` is text and `2024-01-01` a date object.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML's safe subset with the scalars of YAML 1.2: `3e-5` is a number, `no` and `2024-01-01` are text."""

    yaml_implicit_resolvers: dict = {}


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)


Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 012 is twelve
Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would read as something else than text."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


class _Both(Dumper):
    """Quotes also what readers of YAML 1.1, and of 1.2's octal numbers, would take for something else than text."""

    yaml_implicit_resolvers = {
        first: [
            *Dumper.yaml_implicit_resolvers.get(first, ()),
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            ("tag:yaml.org,2002:int", re.compile(r"^0o[0-7]+$")),
        ]
        for first in {*Dumper.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }


def load(text: str) -> Any:
    """What a text says.

    Raises:
        yaml.YAMLError: it is not YAML's safe subset.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise yaml.YAMLError(str(error)) from None


def dump(value: Any) -> str:
    """Values as text that readers of YAML 1.1 and 1.2 understand alike; keys keep their order.

    Args:
        value (`Any`): what JSON can hold, and what `load` gives.

    Returns:
        `str`: YAML.

    Example:

    ```python
    >>> import yaml
    >>> from hf_compress.yaml12 import dump, load
    >>> load("language: no"), yaml.safe_load("language: no")
    ({'language': 'no'}, {'language': False})
    >>> print(dump({"language": "no", "learning_rate": 3e-5, "revision": "3e5"}))
    language: 'no'
    learning_rate: 3.0e-05
    revision: '3e5'
    <BLANKLINE>

    ```
    """
    return yaml.dump(value, Dumper=_Both, sort_keys=False, allow_unicode=True)
