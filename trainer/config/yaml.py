"""YAML for configurations: a repeated key is an error, ``1e-5`` is a number, dotted overrides.

Plain YAML 1.1 silently keeps the last of two equal keys and reads ``1e-5`` as a string.

Example::

    tree = read_yaml("demo.yaml")
    override(tree, "train.lr=1e-5")
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$",
)


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects equal keys in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"line {line}: {key.value!r} is given twice, first in line {lines[key.value]}"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes strings that :class:`_Loader` would read as numbers."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; the message of a :class:`ConfigError` has no path."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}") from None
    tree = _parse(text)
    if not isinstance(tree, dict):
        raise ConfigError(f"must hold a mapping of keys to values, not {type(tree).__name__}")
    return tree


def write_yaml(tree: dict[str, Any]) -> str:
    """Return ``tree`` as YAML, with the keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override(tree: dict[str, Any], assignment: str) -> None:
    """Set one value of ``tree`` in place, from ``dotted.key=value`` with a YAML value."""
    dotted, equals, text = assignment.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"override {assignment!r} is not of the form key=value, as in train.lr=1e-5"
        )
    try:
        value = _parse(text)
        _check_no_comment(text)
    except ConfigError as error:
        raise ConfigError(f"override {assignment!r}: {error}") from None
    *parents, last = keys
    for depth, key in enumerate(parents, start=1):
        child = tree.get(key)
        if not isinstance(child, (dict, type(None))):
            above = ".".join(keys[:depth])
            raise ConfigError(f"override {assignment!r}: {above} is a value, it has no keys")
        # Copy it, because YAML aliases make one mapping appear in several places.
        copy: dict[str, Any] = dict(child or {})
        tree[key] = copy
        tree = copy
    tree[last] = value


def _check_no_comment(text: str) -> None:
    """Raise :class:`ConfigError` if YAML would drop the end of a one-line value."""
    node = yaml.compose(text, Loader=_Loader)
    end = 0 if node is None else node.end_mark.index
    if len(text.rstrip()) > end:
        raise ConfigError("YAML reads what follows '#' as a comment; put the value into quotes")


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise ConfigError(f"{line}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None
