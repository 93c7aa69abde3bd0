"""The YAML that settings are written in: plain scalars as in YAML 1.2.

PyYAML follows 1.1, where `mixed_precision: no` is false and `learning_rate: 1e-5` is text. Here the first is text and
the second a number, as people mean them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, safe values only. A key given twice is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes whatever text YAML 1.1 or 1.2 readers would take for something else."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}


SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _reader in (Loader, Dumper):
    for _kind, _pattern in SCALARS.items():
        _reader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None)


def _text(loader: Any, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)  # the tags are resolved for scalars only
    return str(loader.construct_scalar(node))


# PyYAML reads 010 as octal and 1:30 as sexagesimal; here an int is its decimal digits.
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(_text(loader, node)))
Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(_text(loader, node)))


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=[iInN])", "", text))
