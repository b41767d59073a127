"""Several methods on the same configuration, and the table that sets them side by side.

Each method is an ordinary run in ``OUTPUT_DIR/METHOD``. One that is finished is not repeated, one
that was interrupted is continued.

Example::

    summaries = compare(load_config("config.yaml"), ["sft", "msft"])
    print(compare_table(summaries))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trainer.config import load_config, to_dict
from trainer.directory import CONFIG
from trainer.errors import ConfigError, RunError
from trainer.files import write_atomic
from trainer.loop import Say
from trainer.report import compare_table
from trainer.run import resume, start
from trainer.settings import Config
from trainer.summary import Summary
from trainer.together import this_process


def compare(
    config: Config,
    methods: Sequence[str],
    *,
    say: Say = lambda line: None,
    progress: bool = False,
) -> dict[str, Summary]:
    """Run each method and write ``compare.md`` and ``compare.json``; return summaries by label."""
    check_methods(methods)
    summaries = {}
    for method in methods:
        directory = Path(config.output_dir) / method
        of_method: Any = replace(config, method=method, output_dir=str(directory))  # type: ignore[arg-type]
        say(f"== {method} in {directory}")
        if (directory / CONFIG).exists():
            _check_same(of_method, directory)
            summaries[method.upper()] = resume(directory, say=say, progress=progress)
        else:
            summaries[method.upper()] = start(of_method, say=say, progress=progress)
    if this_process().is_main_process:
        _write(Path(config.output_dir), summaries)
    return summaries


def check_methods(methods: Sequence[str]) -> None:
    """Raise :class:`ConfigError` for a method that does not exist, or comes twice."""
    known = get_args(get_type_hints(Config)["method"])
    for method in methods:
        if method not in known:
            raise ConfigError(f"there is no method {method!r}; there are {', '.join(known)}")
    if not methods or len(set(methods)) < len(methods):
        raise ConfigError("name at least one method, and each only once")


def _check_same(config: Config, directory: Path) -> None:
    """Raise :class:`RunError` where the run in ``directory`` has another configuration."""
    there = to_dict(replace(load_config(directory / CONFIG), output_dir=config.output_dir))
    differing = _differences(there, to_dict(config))
    if differing:
        raise RunError(
            f"the run in {directory} has another {', '.join(differing[:3])}: choose another "
            "output_dir, or remove that directory to begin again"
        )


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], at: str = "") -> list[str]:
    """Return the dotted keys in which two trees differ."""
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{at}{key}.")
        elif a != b:
            found.append(f"{at}{key}")
    return found


def _write(directory: Path, summaries: Mapping[str, Summary]) -> None:
    table = compare_table(summaries, markdown=True)
    write_atomic(directory / "compare.md", f"# Comparison\n\n{table}\n".encode())
    tree = {label: summary.to_dict() for label, summary in summaries.items()}
    content = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(directory / "compare.json", f"{content}\n".encode())
