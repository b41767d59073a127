"""The configuration of a run, read from one YAML file; its keys are in :mod:`trainer.settings`.

Relative paths are taken from the folder of the YAML file, ``output_dir`` from the working
directory. An unknown key is an error that names the nearest valid one.

Example::

    config = load_config("examples/stdlib_tasks/demo.yaml", overrides=["train.lr=1e-5", "seed=1"])
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.checks import check_settings
from trainer.datapaths import resolve_data
from trainer.errors import ConfigError
from trainer.settings import Config
from trainer.typed import build
from trainer.yamlfile import override, read_yaml, write_yaml

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read, complete and check a configuration.

    ``overrides`` are ``dotted.key=value`` with values in YAML; the paths in them follow the same
    rule as those in the file. All paths of the result are absolute. Raises :class:`ConfigError`
    with the file, the dotted key and what to do.
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
