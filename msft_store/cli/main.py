"""The ``msft-store`` command.

Exit codes: 0 done, 1 the store refused (one sentence on stderr says why), 2 wrong usage, 3
``check`` found something wrong. ``--json`` prints one JSON document instead of text, in which a
metric without a finite value is a string.

Example::

    msft-store --store run/store inspect

Completion scripts for shells, made by shtab, which is optional.

Example::

    print(completion(parser, "bash"))
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from typing import Any

from msft_store._util import format_bytes, format_table
from msft_store.cli.check import examine, repair
from msft_store.cli.gc import add_keep_options, forget, gc, policy_of, repack
from msft_store.cli.inspect import inspect, summary
from msft_store.cli.lineage import kept_by, metrics_text
from msft_store.cli.output import (
    as_json,
    counts,
    describe_missing_files,
    discard_output,
    print_text,
    printable,
    show_log,
)
from msft_store.cli.progress import INTERRUPTED, MESSAGE, interruptible
from msft_store.cli.remote import TRANSFERS, add_commands, open_store
from msft_store.cli.tensors import (
    add_diff_options,
    add_export_options,
    add_import_options,
    diff,
    export_files,
    import_files,
)
from msft_store.codec.codecs import LEVELS
from msft_store.errors import InvalidInputError, StoreError
from msft_store.maintenance.check import Report
from msft_store.remote.transport.url import is_url
from msft_store.store import Store

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""What completes names of files, in shtab's words."""


def completion(parser: argparse.ArgumentParser, shell: str, *, paths: Collection[str] = ()) -> str:
    """Return the script that completes a parser's command in a shell.

    ``paths`` are the arguments, of the command and those below it, that are names of files.
    """
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise InvalidInputError(
            "completion scripts are made by shtab, which is not installed: pip install "
            "'msft-store[report]'"
        ) from None
    _mark(parser, paths)
    script: str = shtab.complete(parser, shell=shell)
    return script


def _mark(parser: argparse.ArgumentParser, paths: Collection[str]) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark(below, paths)
        elif action.dest in paths:
            setattr(action, "complete", _FILES)  # noqa: B010


_EXIT = "exit codes: 0 done, 1 the store refused, 2 wrong usage, 3 check found something wrong"
_STORE = "MSFT_STORE"
_PATHS = ("store", "path", "plot", "directory", "base_directory", "like", "url")
"""Arguments that a shell completes with names of files."""

Output = tuple[Any, str]
"""What a command has to say: for ``--json``, and for people."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    show_log(getattr(options, "verbose", 0))
    command: Callable[[argparse.Namespace], Output] = options.command
    try:
        # Who waits for a server waits in a library that does not hear of Ctrl-C.
        away = options.name in TRANSFERS or is_url(_path(options))
        document, text = interruptible(lambda: command(options)) if away else command(options)
        if getattr(options, "json", False):
            print_text(as_json(document))
        elif text:
            print_text(printable(text))
    except StoreError as error:
        print(f"msft-store: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{MESSAGE}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return 0
    except OSError as error:
        discard_output()
        print(f"msft-store: the output was cut off: {error}", file=sys.stderr)
        return 1
    return 3 if isinstance(document, Report) and document.findings else 0


def _open(options: argparse.Namespace) -> Store:
    return open_store(_path(options))


def _path(options: argparse.Namespace) -> str:
    return str(getattr(options, "store", None) or os.environ.get(_STORE) or ".")


def _init(options: argparse.Namespace) -> Output:
    store = Store.create(options.path or _path(options), level=options.level)
    document = {"store": store.path, "level": store.level}
    return document, f"created a store at {store.path}"


def _add_base(options: argparse.Namespace) -> Output:
    base = _open(options).add_base(options.path)
    text = f"base {base.id[:12]}: {len(base.tensors)} tensors, {format_bytes(base.logical_bytes)}"
    return {"id": base.id, "path": base.path, "logical_bytes": base.logical_bytes}, text


def _relocate(options: argparse.Namespace) -> Output:
    base = _open(options).relocate(options.base, options.path)
    return {"id": base.id, "path": base.path}, f"base {base.id[:12]} is now at {base.path}"


def _log(options: argparse.Namespace) -> Output:
    store = _open(options)
    checkpoints = store.log()
    why = kept_by(store.refs(), store.notes())
    rows = [
        (
            checkpoint.id[:12],
            "" if checkpoint.step is None else str(checkpoint.step),
            format_bytes(checkpoint.logical_bytes),
            format_bytes(checkpoint.stored_bytes),
            metrics_text(checkpoint.metrics),
            " ".join(checkpoint.tags),
            why.get(checkpoint.id, ""),
        )
        for checkpoint in checkpoints
    ]
    header = ("checkpoint", "step", "logical", "stored", "metrics", "tags", "kept by")
    text = format_table(header, rows, align="<>>><<<") if rows else "no checkpoints yet"
    return [summary(checkpoint) for checkpoint in checkpoints], text


def _inspect(options: argparse.Namespace) -> Output:
    return inspect(_open(options), options.checkpoint, plot=options.plot)


def _gc(options: argparse.Namespace) -> Output:
    store = _open(options)
    return gc(store, policy_of(store, options), dry_run=options.dry_run)


def _check(options: argparse.Namespace) -> Output:
    return examine(_open(options), read_data=options.read_data)


def _export(options: argparse.Namespace) -> Output:
    return export_files(_open(options), options)


def _pin(options: argparse.Namespace) -> Output:
    store = _open(options)
    checkpoint = store.get(options.checkpoint)
    store.pin(checkpoint, options.ref)
    text = f"{options.ref} points to {checkpoint.id[:12]}"
    return {"ref": options.ref, "checkpoint": checkpoint.id}, text


def _unpin(options: argparse.Namespace) -> Output:
    _open(options).unpin(options.ref)
    return {"ref": options.ref}, f"{options.ref} is gone; its checkpoint stays until a gc drops it"


def _forget(options: argparse.Namespace) -> Output:
    store = _open(options)
    policy = policy_of(store, options)
    return forget(store, options.checkpoints, policy, dry_run=options.dry_run)


def _repack(options: argparse.Namespace) -> Output:
    return repack(_open(options), dry_run=options.dry_run)


def _diff(options: argparse.Namespace) -> Output:
    return diff(_open(options), options.first, options.second, plot=options.plot)


def _import(options: argparse.Namespace) -> Output:
    return import_files(_open(options), options)


def _completion(options: argparse.Namespace) -> Output:
    script = completion(_parser(), options.shell, paths=_PATHS)
    return {"shell": options.shell, "script": script}, script


def _unlock(options: argparse.Namespace) -> Output:
    store = _open(options)
    removed, stay = store.unlock(force=options.force), store.locks()
    lines = [f"removed  {lock}" for lock in removed] + [f"stays    {lock}" for lock in stay]
    return {"removed": removed, "locks": stay}, "\n".join(lines) or "no locks"


def _stats(options: argparse.Namespace) -> Output:
    store = _open(options)
    stats = store.stats()
    return dataclasses.asdict(stats), counts(stats) + describe_missing_files(store.bases())


def _parser() -> argparse.ArgumentParser:
    common = _common_options()
    parser = argparse.ArgumentParser(
        prog="msft-store",
        description="A content-addressed delta store for model checkpoints.",
        epilog=f"example: msft-store --store run/store inspect\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=version("msft-store"))
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], Output], about: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"example: msft-store {example}\n{_EXIT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        command.set_defaults(command=run)
        return command

    init = add("init", _init, "create a store", "init run/store")
    init.add_argument("path", nargs="?", help="where; the same as --store")
    init.add_argument(
        "--level",
        choices=LEVELS,
        default=LEVELS[0],
        help="what saves aim for: little time (fast, the default) or little space (small)",
    )

    add_base = add("add-base", _add_base, "record a base model by content", "add-base Qwen2.5-0.5B")
    add_base.add_argument("path", help="a safetensors file, or a directory of them")

    relocate = add(
        "relocate", _relocate, "tell where a base's files are now", "relocate 3fa9 /models/qwen"
    )
    relocate.add_argument("base", help="id of the base, or a unique prefix")
    relocate.add_argument("path", help="the same model, in its new place")

    add("log", _log, "list the checkpoints, oldest first, and what keeps them", "log --json")

    look = add(
        "inspect",
        _inspect,
        "show the lineage as a tree, or the tensors of one checkpoint or base",
        "inspect 3fa9",
    )
    look.add_argument(
        "checkpoint",
        nargs="?",
        help="id of a checkpoint or of a base, a unique prefix of one, or a ref",
    )
    look.add_argument("--plot", metavar="FILE", help="draw the lineage (.png, .svg, .pdf)")

    differ = add(
        "diff", _diff, "show what differs between two checkpoints, by bits", "diff 3fa9 best"
    )
    add_diff_options(differ)

    collect = add(
        "gc",
        _gc,
        "free the space that no checkpoint needs; with rules, first forget what they do not keep",
        "gc --keep-last 3 --keep-best loss:min --dry-run",
    )
    add_keep_options(collect)

    dense = add("repack", _repack, "make few dense packs of many", "repack --dry-run")
    dense.add_argument("--dry-run", action="store_true", help="only print the plan")

    check = add("check", _check, "look for damage", "check --read-data")
    check.add_argument("--read-data", action="store_true", help="decode and compare everything")

    fix = add(
        "repair",
        lambda options: repair(_path(options), dry_run=options.dry_run),
        "keep what is sound of a damaged store and set the rest aside, in its directory quarantine",
        "repair --dry-run",
    )
    fix.add_argument("--dry-run", action="store_true", help="only print the plan")

    bring = add(
        "import",
        _import,
        "save a safetensors file or directory as a checkpoint",
        "import my-model --parent 3fa9 --step 100",
    )
    add_import_options(bring)

    export = add(
        "export", _export, "write a checkpoint as plain safetensors", "export best my-model"
    )
    _add_checkpoint(export)
    add_export_options(export)

    pin = add("pin", _pin, "point a ref to a checkpoint, which then stays", "pin 3fa9 best")
    _add_checkpoint(pin)
    pin.add_argument("ref", help="name of the ref")

    unpin = add("unpin", _unpin, "remove a ref", "unpin best")
    unpin.add_argument("ref", help="name of the ref")

    drop = add(
        "forget",
        _forget,
        "forget checkpoints by name, or all that rules do not keep; their space stays until a gc",
        "forget --keep-last 3 --keep-best loss:min --dry-run",
    )
    drop.add_argument("checkpoints", nargs="*", help="ids, unique prefixes of them, or refs")
    add_keep_options(drop)

    unlock = add("unlock", _unlock, "remove dead owners' locks, list the others", "unlock --json")
    unlock.add_argument("--force", action="store_true", help="remove those of live owners too")

    complete = add(
        "completion", _completion, "print a shell's completion script", "completion bash"
    )
    complete.add_argument("shell", choices=SHELLS)

    add("stats", _stats, "count checkpoints, chunks and bytes", "stats --json")
    add_commands(add, _path)
    return parser


def _common_options() -> argparse.ArgumentParser:
    """Return the options that every command takes, before or after its name."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help=f"the store's directory, or a URL to read from (default: ${_STORE}, else the current "
        "directory)",
    )
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text"
    )
    common.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,
        help="log to stderr what the store does; twice: details",
    )
    return common


def _add_checkpoint(command: argparse.ArgumentParser, **how: Any) -> None:
    command.add_argument(
        "checkpoint", help="id of a checkpoint, a unique prefix of one, or a ref", **how
    )


if __name__ == "__main__":
    sys.exit(main())
