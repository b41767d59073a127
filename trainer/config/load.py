"""Load the configuration of a run from one YAML file; :mod:`trainer.config.schema` has its keys.

Relative paths are taken from the folder of the YAML file, ``output_dir`` from the working
directory. An unknown key is an error that names the nearest valid one. Values are checked against
the annotations of the dataclasses: an integer is accepted for a float, nothing else is converted.

Example::

    config = build(Config, {"output_dir": "runs/a", "train": {"lr": 1e-5}})
    config = load_config("examples/stdlib_tasks/demo.yaml", overrides=["train.lr=1e-5", "seed=1"])
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trainer.config.checks import HUB_ID, check_settings
from trainer.config.data_paths import RELATIVE, resolve_data
from trainer.config.metric_keys import resolve_metric
from trainer.config.other_names import find_absent, find_other_name
from trainer.config.schema import Config, DataConfig
from trainer.config.yaml import override, read_yaml, write_yaml
from trainer.errors import ConfigError
from trainer.text import did_you_mean

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
}


def build(cls: type[T], raw: Any, *, at: str = "") -> T:
    """Return a dataclass of the configuration from nested mappings.

    Raises :class:`ConfigError` if a key is unknown or missing, or a value has the wrong type. The
    message begins with the dotted key; ``at`` is that of ``raw``.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{at or 'the configuration'} must be a mapping of keys, got {_show(raw)}"
        )
    kind: Any = cls
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            raise ConfigError(_describe_unknown(str(key), list(fields), at))
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise ConfigError(f"{_join(at, name)} is missing, it has no default")
    hints = get_type_hints(cls)
    built: T = kind(
        **{name: _convert(hints[name], value, _join(at, name)) for name, value in raw.items()}
    )
    return built


def _convert(hint: Any, value: Any, at: str) -> Any:
    """Return ``value`` as an annotation wants it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        hints = [arg for arg in args if arg is not types.NoneType]
        hint, *others = sorted(hints, key=dataclasses.is_dataclass)
        return _convert(others[0] if others and isinstance(value, Mapping) else hint, value, at)
    if origin is Literal:
        if value not in args:
            near = did_you_mean(str(value), args)
            choices = ", ".join(map(str, args))
            raise ConfigError(f"{at} must be one of {choices}, got {_show(value)}{near}")
        return value
    if origin is tuple:
        return _convert_list(args, value, at)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, at=at)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at} must be a mapping of names, got {_show(value)}")
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{at}: the name {name!r} is not a string; put it into quotes")
        return {name: _convert(args[1], item, _join(at, name)) for name, item in value.items()}
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is not float and type(value) is hint:
        return value
    advice = "; put it into quotes" if hint is str and value is not None else ""
    raise ConfigError(f"{at} must be {_WORDS[hint]}, got {_show(value)}{advice}")


def _convert_list(hints: tuple[Any, ...], value: Any, at: str) -> tuple[Any, ...]:
    is_list = isinstance(value, (list, tuple))
    if hints[1:] == (...,):
        if not is_list:
            raise ConfigError(f"{at} must be a list, got {_show(value)}")
        hints = hints[:1] * len(value)
    elif not is_list or len(value) != len(hints):
        raise ConfigError(f"{at} must be a list of {len(hints)} values, got {_show(value)}")
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_convert(hint, item, f"{at}[{i}]") for i, (hint, item) in pairs)


def _describe_unknown(key: str, siblings: list[str], at: str) -> str:
    """Return the message for an unknown key, with the nearest valid one."""
    message = f"unknown key {_join(at, key)!r}"
    elsewhere = {dotted.rpartition(".")[2]: dotted for dotted in reversed([*list_keys(Config)])}
    if key in elsewhere:
        return f"{message}; did you mean {elsewhere[key]!r}?"
    name = key.lower().replace("-", "_")
    if found := find_other_name(name):
        same, remark = found
        return f"{message}; did you mean {same!r}{f' ({remark})' * bool(remark)}?"
    if absent := find_absent(name):
        return f"{message}; {absent}"
    if near := difflib.get_close_matches(key, siblings, n=1):
        return f"{message}; did you mean {_join(at, near[0])!r}?"
    if near := difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8):
        return f"{message}; did you mean {elsewhere[near[0]]!r}?"
    return f"{message}; the keys here are {', '.join(sorted(siblings))}"


def list_keys(cls: Any, at: str = "") -> Iterator[str]:
    """Yield the dotted keys of a dataclass and of those in it."""
    for name, hint in get_type_hints(cls).items():
        # An optional dataclass, as in ``LoraConfig | None``, has keys, too.
        kind = get_args(hint)[0] if type(None) in get_args(hint) else hint
        if dataclasses.is_dataclass(kind):
            yield from list_keys(kind, _join(at, name))
        yield _join(at, name)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)


RECORDED: Mapping[str, Any] = {"average": {"kind": "none"}}
"""What a run's recorded configuration means by a section that it lacks: it was written by a version
that had none, so today's defaults are not its own."""


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Read, complete and check the configuration of a run.

    Args:
        path: A YAML file. Relative paths in it are taken from its folder, except ``output_dir``,
            which is taken from the working directory.
        overrides: Assignments ``dotted.key=value`` with values in YAML, as on the command line.
            Paths in them are taken from the same folders.
        defaults: Values of keys that the file lacks, in place of the usual defaults.

    Returns:
        The configuration. All of its paths are absolute.

    Raises:
        ConfigError: A key is unknown or missing, or a value is wrong. The message names the file,
            the dotted key and what to do.
    """
    path = Path(path)
    try:
        tree = {**(defaults or {}), **read_yaml(path)}
        for assignment in overrides:
            override(tree, assignment)
        config = build(Config, tree)
        folder = path.absolute().parent
        config = replace(
            config,
            output_dir=str(Path(config.output_dir).absolute()),
            model=replace(config.model, path=_resolve_model(config.model.path, folder)),
            data=_resolve_metrics(resolve_data(config.data, folder), folder),
            evaluation=replace(
                config.evaluation,
                metric=resolve_metric(config.evaluation.metric, folder, at="evaluation.metric"),
            ),
        )
        check_settings(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values."""
    tree: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the JSON values of a configuration by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dump(config: Config) -> str:
    """Return the configuration as YAML that :func:`load_config` reads to the same again."""
    return write_yaml(to_dict(config))


def _resolve_metrics(data: DataConfig, folder: Path) -> DataConfig:
    """Return ``data`` with the names of metrics resolved (:mod:`trainer.config.metric_keys`)."""
    sub_datasets = {
        name: files
        if files.metric is None
        else replace(
            files,
            metric=resolve_metric(files.metric, folder, at=f"data.sub_datasets.{name}.metric"),
        )
        for name, files in data.sub_datasets.items()
    }
    return replace(data, sub_datasets=sub_datasets)


def _resolve_model(path: str, folder: Path) -> str:
    """Return an absolute path for a directory, and an id on the hub unchanged."""
    if (folder / path).exists():
        return str(folder / path)
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path: there is no directory {folder / path}; {RELATIVE}")
    return path
