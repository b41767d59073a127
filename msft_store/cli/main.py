"""The ``msft-store`` command.

Exit codes: 0 done, 1 the store refused (the reason is on stderr), 2 wrong usage, 3 ``check`` found
damage. ``--json`` prints one JSON document instead of text, in which a metric without a finite
value is a string. Completion scripts need the optional package shtab.

Example::

    msft-store --store run/store inspect
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from msft_store._util import format_bytes, format_table
from msft_store.cli.bisect import add_bisect_options, bisect
from msft_store.cli.cat import add_cat_options, cat
from msft_store.cli.check import check, repair
from msft_store.cli.gc import add_keep_options, forget, gc, policy_of, repack
from msft_store.cli.inspect import inspect, summary
from msft_store.cli.lineage import format_metrics, kept_by
from msft_store.cli.output import (
    discard_output,
    format_missing_bases,
    format_stats,
    print_text,
    printable,
    show_log,
    to_json,
)
from msft_store.cli.progress import INTERRUPTED, MESSAGE, run_interruptibly
from msft_store.cli.remote import (
    STORE_VARIABLE,
    TRANSFERS,
    Output,
    add_transfer_commands,
    open_store,
    store_path,
)
from msft_store.cli.tensors import (
    add_average_options,
    add_diff_options,
    add_export_options,
    add_import_options,
    average,
    diff,
    export_files,
    import_files,
)
from msft_store.errors import InvalidInputError, StoreError
from msft_store.format.layout import NEWEST
from msft_store.maintenance.check import Report
from msft_store.remote.api import upgrade
from msft_store.remote.transport.url import is_url
from msft_store.store import Store, open_remote

_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""Shell functions that complete names of files, for shtab."""
_PATHS = ("store", "path", "place", "plot", "directory", "base_directory", "like", "url", "out")
"""Arguments that a shell completes with names of files."""
_WITHOUT_STORE = ("init", "upgrade", "repair", "completion", "cat", "bisect", *TRANSFERS)
"""Commands that do not open the store themselves."""
_EXIT = "exit codes: 0 done, 1 the store refused, 2 wrong usage, 3 check found damage"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    show_log(getattr(options, "verbose", 0))
    try:
        if options.name in TRANSFERS or is_url(store_path(options)):
            document, text = run_interruptibly(lambda: _run(options))
        else:
            document, text = _run(options)
        if getattr(options, "json", False):
            print_text(to_json(document))
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
        print(f"msft-store: cannot write the output: {error}", file=sys.stderr)
        return 1
    return 3 if isinstance(document, Report) and document.findings else 0


def _run(options: argparse.Namespace) -> Output:
    command: Callable[..., Output] = options.command
    if options.name in _WITHOUT_STORE:
        return command(options)
    return command(open_store(options), options)


def _init(options: argparse.Namespace) -> Output:
    store = Store.create(options.path or store_path(options))
    return {"store": store.path}, f"created a store at {store.path}"


def _upgrade(options: argparse.Namespace) -> Output:
    path = str(options.path or store_path(options))
    store = open_remote(path) if is_url(path) else Store.open(path)
    before = store.version
    if before == NEWEST:
        text = f"the store at {store.path} is of version {NEWEST} already"
    elif options.dry_run:
        text = f"would upgrade the store at {store.path} from version {before} to {NEWEST}"
    else:
        upgrade(path) if is_url(path) else store.upgrade()
        text = f"upgraded the store at {store.path} from version {before} to {NEWEST}"
    return {"store": store.path, "before": before, "version": NEWEST}, text


def _add_base(store: Store, options: argparse.Namespace) -> Output:
    base = store.add_base(options.path)
    text = f"base {base.id[:12]}: {len(base.tensors)} tensors, {format_bytes(base.logical_bytes)}"
    return {"id": base.id, "path": base.path, "logical_bytes": base.logical_bytes}, text


def _relocate(store: Store, options: argparse.Namespace) -> Output:
    base = store.relocate(options.base, options.path)
    return {"id": base.id, "path": base.path}, f"base {base.id[:12]} is now at {base.path}"


def _log(store: Store, options: argparse.Namespace) -> Output:
    checkpoints = store.log()
    reasons = kept_by(store.refs(), store.notes())
    rows = [
        (
            checkpoint.id[:12],
            "" if checkpoint.step is None else str(checkpoint.step),
            format_bytes(checkpoint.logical_bytes),
            format_bytes(checkpoint.stored_bytes),
            format_metrics(checkpoint.metrics),
            " ".join(checkpoint.tags),
            reasons.get(checkpoint.id, ""),
        )
        for checkpoint in checkpoints
    ]
    header = ("checkpoint", "step", "logical", "stored", "metrics", "tags", "kept by")
    text = format_table(header, rows, align="<>>><<<") if rows else "no checkpoints yet"
    return [summary(checkpoint) for checkpoint in checkpoints], text


def _pin(store: Store, options: argparse.Namespace) -> Output:
    checkpoint = store.get(options.checkpoint)
    store.pin(checkpoint, options.ref)
    text = f"{options.ref} points to {checkpoint.id[:12]}"
    return {"ref": options.ref, "checkpoint": checkpoint.id}, text


def _unpin(store: Store, options: argparse.Namespace) -> Output:
    store.unpin(options.ref)
    text = (
        f"{options.ref} was removed; its checkpoint stays until forget or a gc with rules drops it"
    )
    return {"ref": options.ref}, text


def _forget(store: Store, options: argparse.Namespace) -> Output:
    policy = policy_of(store, options)
    return forget(store, options.checkpoints, policy, dry_run=options.dry_run)


def _completion(options: argparse.Namespace) -> Output:
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise InvalidInputError(
            "completion scripts need shtab, which is not installed: pip install "
            "'msft-store[report]'"
        ) from None
    parser = _parser()
    _mark_paths(parser)
    script: str = shtab.complete(parser, shell=options.shell)
    return {"shell": options.shell, "script": script}, script


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command)
        elif action.dest in _PATHS:
            setattr(action, "complete", _FILES)  # noqa: B010


def _unlock(store: Store, options: argparse.Namespace) -> Output:
    removed, left = store.unlock(force=options.force), store.locks()
    lines = [f"removed  {lock}" for lock in removed] + [f"stays    {lock}" for lock in left]
    return {"removed": removed, "locks": left}, "\n".join(lines) or "no locks"


def _stats(store: Store, options: argparse.Namespace) -> Output:
    stats = store.stats()
    return dataclasses.asdict(stats), format_stats(stats) + format_missing_bases(store.bases())


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
        name: str, run: Callable[..., Output], about: str, example: str
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

    command = add("init", _init, "create a store", "init run/store")
    command.add_argument("path", nargs="?", help="directory of the new store; the same as --store")

    command = add(
        "upgrade",
        _upgrade,
        "let an older store be written in the newest version of the format, which takes less space",
        "upgrade run/store --dry-run",
    )
    command.add_argument("path", nargs="?", help="directory of the store; the same as --store")
    _add_dry_run(command)

    command = add("add-base", _add_base, "record a base model by content", "add-base Qwen2.5-0.5B")
    command.add_argument("path", help="a safetensors file, or a directory of them")

    command = add("relocate", _relocate, "record a base's new place", "relocate 3fa9 /models/qwen")
    command.add_argument("base", help="id of the base, or a unique prefix")
    command.add_argument("path", help="new file or directory of the same model")

    add("log", _log, "list the checkpoints, oldest first", "log --json")

    command = add(
        "inspect",
        inspect,
        "show the lineage as a tree, or the tensors of one checkpoint or base",
        "inspect 3fa9",
    )
    command.add_argument(
        "checkpoint",
        nargs="?",
        help="id of a checkpoint or of a base, a unique prefix of one, or a ref",
    )
    command.add_argument("--plot", metavar="FILE", help="draw the lineage (.png, .svg, .pdf)")

    command = add(
        "diff", diff, "show the differences between two checkpoints, bit by bit", "diff 3fa9 best"
    )
    add_diff_options(command)

    add_average_options(
        add(
            "average",
            average,
            "save the weighted mean of checkpoints as a checkpoint",
            "average 3fa9 best --weights 0.3,0.7 --ref mean",
        )
    )

    command = add(
        "gc",
        gc,
        "free space that no checkpoint needs; with rules, first forget the checkpoints they drop",
        "gc --keep-last 3 --keep-best loss:min --dry-run",
    )
    add_keep_options(command)

    _add_dry_run(add("repack", repack, "merge packs into fewer, denser ones", "repack --dry-run"))

    command = add("check", check, "look for damage", "check --read-data")
    command.add_argument("--read-data", action="store_true", help="decode and verify every chunk")

    command = add(
        "repair",
        repair,
        "keep the sound parts of a damaged store and move the others to its directory quarantine",
        "repair --dry-run",
    )
    _add_dry_run(command)

    command = add(
        "import",
        import_files,
        "save a safetensors file or directory as a checkpoint",
        "import my-model --parent 3fa9 --step 100",
    )
    add_import_options(command)

    command = add(
        "export", export_files, "write a checkpoint as plain safetensors", "export best my-model"
    )
    _add_checkpoint(command)
    add_export_options(command)

    add_cat_options(
        add(
            "cat",
            cat,
            "show one tensor of a checkpoint, or write it to a file or to stdout",
            "cat run/store@best lm_head.weight",
        )
    )

    add_bisect_options(
        add(
            "bisect",
            bisect,
            "find the first checkpoint for which a command fails",
            "bisect run/store first last -- python evaluate.py {}",
        )
    )

    command = add("pin", _pin, "protect a checkpoint by a ref", "pin 3fa9 best")
    _add_checkpoint(command)
    command.add_argument("ref", help="name of the ref")

    add("unpin", _unpin, "remove a ref", "unpin best").add_argument("ref", help="name of the ref")

    command = add(
        "forget",
        _forget,
        "forget named checkpoints, or all that rules drop; gc then frees their space",
        "forget --keep-last 3 --keep-best loss:min --dry-run",
    )
    command.add_argument("checkpoints", nargs="*", help="ids, unique prefixes of them, or refs")
    add_keep_options(command)

    command = add("unlock", _unlock, "remove the locks of dead processes", "unlock --json")
    command.add_argument(
        "--force", action="store_true", help="remove the locks of living processes too"
    )

    add(
        "completion", _completion, "print a shell's completion script", "completion bash"
    ).add_argument("shell", choices=tuple(_FILES))

    add("stats", _stats, "count checkpoints, chunks and bytes", "stats --json")
    add_transfer_commands(add)
    return parser


def _common_options() -> argparse.ArgumentParser:
    """Return the options that every command takes, before or after its name."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="the store's directory, or a URL to read from (default: "
        f"${STORE_VARIABLE}, else the current directory)",
    )
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text"
    )
    common.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,
        help="log the store's actions to stderr; twice: with details",
    )
    return common


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="only print the plan")


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", help="id of a checkpoint, a unique prefix of one, or a ref")


if __name__ == "__main__":
    sys.exit(main())
