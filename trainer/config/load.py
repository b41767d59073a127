"""Load a run's configuration from one YAML file; :mod:`trainer.config.schema` has its keys.

Relative paths are relative to the folder of the YAML file, ``output_dir`` to the working directory.
An unknown key is an error that names the nearest valid one. Values are checked against the
annotations of the dataclasses: an integer is accepted for a float, and nothing else is converted.

Example::

    config = build(Config, {"output_dir": "runs/a", "train": {"lr": 1e-5}})
    config = load_config("examples/stdlib_tasks/demo.yaml", overrides=["train.lr=1e-5", "seed=1"])
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from trainer.config.checks import check_settings
from trainer.config.data_paths import resolve_data
from trainer.config.schema import Config
from trainer.config.yaml import override, read_yaml, write_yaml
from trainer.errors import ConfigError

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
}


def build(cls: type[T], raw: Any) -> T:
    """Return a ``cls`` from nested mappings; raises :class:`ConfigError` with the dotted key."""
    return cast(T, _build(cls, raw, at="", root=cls))


def _build(cls: Any, raw: Any, *, at: str, root: Any) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{at or 'the configuration'} must be a mapping of keys, got {_show(raw)}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in raw:
        if key not in fields:
            raise ConfigError(_unknown(str(key), list(fields), at=at, root=root))
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise ConfigError(f"{_join(at, name)} is missing, it has no default")
    hints = get_type_hints(cls)
    return cls(
        **{
            name: _convert(hints[name], value, at=_join(at, name), root=root)
            for name, value in raw.items()
        }
    )


def _convert(hint: Any, value: Any, *, at: str, root: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hints = [arg for arg in args if arg is not types.NoneType]
        hint, *others = sorted(hints, key=dataclasses.is_dataclass)
        chosen = others[0] if others and isinstance(value, Mapping) else hint
        return _convert(chosen, value, at=at, root=root)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), args, n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            choices = ", ".join(map(str, args))
            raise ConfigError(f"{at} must be one of {choices}, got {_show(value)}{hint_text}")
        return value
    if origin is tuple and args[1:] == (...,):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{at} must be a list, got {_show(value)}")
        args = args[:1] * len(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise ConfigError(f"{at} must be a list of {len(args)} values, got {_show(value)}")
        return tuple(
            _convert(arg, item, at=f"{at}[{i}]", root=root)
            for i, (arg, item) in enumerate(zip(args, value, strict=True))
        )
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, at=at, root=root)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(args[1], value, at=at, root=root)
    return _scalar(hint, value, at=at)


def _mapping(hint: Any, value: Any, *, at: str, root: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{at} must be a mapping of names, got {_show(value)}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"{at}: the name {name!r} is not a string; put it into quotes")
    return {
        name: _convert(hint, item, at=_join(at, name), root=root) for name, item in value.items()
    }


def _scalar(hint: Any, value: Any, *, at: str) -> Any:
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is not float and type(value) is hint:
        return value
    advice = "; put it into quotes" if hint is str and value is not None else ""
    raise ConfigError(f"{at} must be {_WORDS[hint]}, got {_show(value)}{advice}")


def _unknown(key: str, siblings: list[str], *, at: str, root: Any) -> str:
    message = f"unknown key {_join(at, key)!r}"
    elsewhere = reversed(list(_dotted_keys(root)))
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in elsewhere}
    if key in leaves:
        return f"{message}; did you mean {leaves[key]!r}?"
    if near := difflib.get_close_matches(key, siblings, n=1):
        return f"{message}; did you mean {_join(at, near[0])!r}?"
    if near := difflib.get_close_matches(key, leaves, n=1, cutoff=0.8):
        return f"{message}; did you mean {leaves[near[0]]!r}?"
    return f"{message}; the keys here are {', '.join(sorted(siblings))}"


def _dotted_keys(cls: Any, at: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        if type(None) in get_args(hint):
            hint = get_args(hint)[0]  # noqa: PLW2901 - what it is where it is something
        if dataclasses.is_dataclass(hint):
            yield from _dotted_keys(hint, _join(at, name))
        yield _join(at, name)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read, complete and check the configuration of a run.

    Args:
        path: A YAML file. Relative paths in it are taken from its folder, except ``output_dir``,
            which is taken from the working directory.
        overrides: Assignments ``dotted.key=value`` with values in YAML, as on the command line.
            Paths in them follow the same rule.

    Returns:
        The configuration. All of its paths are absolute.

    Raises:
        ConfigError: A key is unknown or missing, or a value is wrong. The message names the file,
            the dotted key and what to do.
    """
    path = Path(path)
    try:
        tree = read_yaml(path)
        for assignment in overrides:
            override(tree, assignment)
        config = _resolve(build(Config, tree), path.absolute().parent)
        check_settings(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values."""
    tree: dict[str, Any] = asdict(config)
    tree["train"]["betas"] = list(config.train.betas)
    tree["log_with"] = list(config.log_with)
    if config.lora is not None and config.lora.target_modules is not None:
        tree["lora"]["target_modules"] = list(config.lora.target_modules)
    return tree


def dump(config: Config) -> str:
    """Return the configuration as YAML that :func:`load_config` reads to the same again."""
    return write_yaml(to_dict(config))


def _resolve(config: Config, folder: Path) -> Config:
    """Make paths absolute and spell out where the data lies."""
    return replace(
        config,
        output_dir=str(Path(config.output_dir).absolute()),
        model=replace(config.model, path=_model_path(config.model.path, folder)),
        data=resolve_data(config.data, folder),
    )


def _model_path(path: str, folder: Path) -> str:
    """Return an absolute path where ``path`` is a directory, and a hub id as it stands."""
    if (folder / path).exists():
        return str(folder / path)
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path: there is no directory {folder / path}")
    return path
