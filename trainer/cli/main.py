"""The ``msft-train`` command.

Results go to stdout (``--json``: as JSON), progress and errors to stderr. Errors that a user can
act on are one sentence, without a traceback.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from safetensors import SafetensorError

from msft_store import StoreError
from trainer.cli import compare as cli_compare
from trainer.cli import simulate as cli_simulate
from trainer.cli.logs import show_log
from trainer.comparison.tables import describe_failures
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.examples import Example
from trainer.data.load import load_mixture
from trainer.distributed import is_alone, this_process
from trainer.errors import PausedError, TrainerError
from trainer.model.lora import load_for_training
from trainer.report.flops import ModelSize
from trainer.report.plan import Counts, Plan, plan
from trainer.report.report import DIVERGED, compare_table, write_report
from trainer.report.summary import Summary
from trainer.signals import Interrupted
from trainer.training.preflight import check_compatibility
from trainer.training.run import resume, start
from trainer.training.workspace import quiet_libraries

_PAUSED = 75
_EXIT_CODES = """\
exit codes:
  0    done
  1    an error; one sentence on stderr says what to do
  2    the command line is wrong
  3    training diverged; the run is over, its result is the best before that
  75   paused, for there is no room on the disk or within max_disk; one sentence on stderr says what
       is needed, `msft-train resume RUN` goes on
  130  interrupted by SIGINT (143 by SIGTERM); continue with `msft-train resume RUN`
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more overrides once an option stood between them.
    if any(argument.startswith("-") for argument in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    quiet_libraries()
    show_log(quiet=options.quiet, verbosity=options.verbose)
    try:
        return int(options.command(options) or 0)
    except Interrupted as interrupted:
        _complain(f"{interrupted}; continue with `msft-train resume {interrupted.directory}`")
        return 128 + interrupted.number
    except KeyboardInterrupt:
        _complain("interrupted at once; continue with `msft-train resume RUN`")
        return 128 + signal.SIGINT
    except PausedError as error:
        _complain(_sentence(error))
        return _PAUSED
    except torch.OutOfMemoryError as error:
        _complain(f"{_sentence(error)}; lower train.micro_batch_size or evaluation.batch_size")
    except (TrainerError, StoreError, SafetensorError, OSError) as error:
        _complain(_sentence(error))
    except RuntimeError as error:
        if not is_alone(error):
            raise
        _complain(
            "another process of this run has ended, so this one ends too; when what it says is put "
            "right, continue with `msft-train resume RUN`"
        )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msft-train",
        description="Multi-task supervised fine-tuning that rolls back to where sub-datasets peak.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("msft-store"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(commands, "run", _run, "begin a run", "msft-train run config.yaml train.lr=2e-5 seed=1")
    _add(commands, "resume", _resume, "continue a run after a kill", "msft-train resume runs/demo")
    _add(
        commands,
        "plan",
        _plan,
        "say what a run takes at most: steps, FLOPs, disk",
        "msft-train plan config.yaml msft.compute_budget=5",
    )
    _add(
        commands,
        "report",
        _report,
        "write report, plots and result.json of a run again",
        "msft-train report runs/demo",
    )
    comparing = _add(
        commands,
        "compare",
        _compare,
        "run several methods and set them side by side",
        "msft-train compare config.yaml --methods sft,msft",
    )
    cli_compare.add_options(comparing)
    simulating = _add(
        commands,
        "simulate",
        _simulate,
        "replay other policies on the curves of a recorded run",
        "msft-train simulate runs/demo --sweep peak-window=2,4,off",
    )
    cli_simulate.add_options(simulating)
    return parser


def _add(
    commands: Any, name: str, command: Any, text: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    if name in ("resume", "report"):
        parser.add_argument("run", metavar="RUN", help="the directory of a run")
    elif name != "simulate":
        parser.add_argument("config", metavar="CONFIG", help="a YAML file")
        parser.add_argument(
            "overrides",
            metavar="KEY=VALUE",
            nargs="*",
            default=[],
            help="overrides, as in train.lr=2e-5",
        )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="show the store's log too; twice: details",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    summary = start(config, **_progress(options))
    _print_summary(options, summary)
    return _exit_code(summary)


def _resume(options: argparse.Namespace) -> int:
    summary = resume(options.run, **_progress(options))
    _print_summary(options, summary)
    return _exit_code(summary)


def _report(options: argparse.Namespace) -> None:
    _print_summary(options, write_report(options.run))


def _compare(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    try:
        comparison = cli_compare.comparison_of(config, options, progress=not options.quiet)
    except Interrupted as interrupted:
        _complain(f"{interrupted}; give the same command again to go on")
        return 128 + interrupted.number
    tree, text = cli_compare.shown(comparison)
    _print(tree if options.json else text)
    for remark in describe_failures(comparison):
        _complain(remark)
    return 1 if comparison.failures else 3 if comparison.diverged else 0


def _simulate(options: argparse.Namespace) -> None:
    tree, text = cli_simulate.simulations(options)
    _print(tree if options.json else text)


def _exit_code(summary: Summary) -> int:
    """Return 0, or say that training diverged and return the code for that."""
    if not summary.diverged:
        return 0
    _complain(f"{summary.method}: {DIVERGED}")
    return 3


def _plan(options: argparse.Namespace) -> None:
    found = plan_of(load_config(options.config, options.overrides))
    tree = {**asdict(found), "rollback_bytes": found.rollback_bytes}
    _print(tree if options.json else found.to_text())


def plan_of(config: Config) -> Plan:
    """Count a configuration's data and model, and work out what its run takes at most."""
    loaded = load_for_training(config)
    mixture = load_mixture(
        config.data, loaded.tokenizer, max_validation=config.evaluation.max_examples
    )
    check_compatibility(config, loaded, mixture)
    generates = config.evaluation.metric == "exact_match"
    counts = {}
    for name, sub in mixture.items():
        passes = _lengths(sub.validation.examples)
        if generates:
            passes += [len(example.prompt) for example in sub.validation.examples]
        counts[name] = Counts(
            train=len(sub.train.examples),
            train_tokens=sum(_lengths(sub.train.examples)),
            train_attention_tokens=sum(n * n for n in _lengths(sub.train.examples)),
            validation=len(sub.validation.examples),
            validation_tokens=sum(passes),
            validation_attention_tokens=sum(n * n for n in passes),
            too_long=sub.too_long,
        )
    size = ModelSize(
        parameters=loaded.parameters,
        trainable=loaded.trainable,
        layers=loaded.layers,
        hidden=loaded.hidden,
    )
    return plan(config, counts, size, loaded.full_bytes, trained_bytes=loaded.trained_bytes)


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example) for example in examples]


def _progress(options: argparse.Namespace) -> dict[str, Any]:
    return {"progress": not options.quiet}


def _print_summary(options: argparse.Namespace, summary: Summary) -> None:
    _print(summary.to_dict() if options.json else compare_table({summary.method.upper(): summary}))


def _print(result: Any) -> None:
    if this_process().is_main_process:
        text = result if isinstance(result, str) else json.dumps(result, indent=2)
        print(text, flush=True)


def _complain(sentence: str) -> None:
    print(f"msft-train: {sentence}", file=sys.stderr)


def _sentence(error: BaseException) -> str:
    """Return an error's first line; of a system error what and where."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
