"""The ``msft-train`` command.

Results go to stdout (with ``--json`` as JSON), progress and errors to stderr. Errors that a user
can correct are one sentence, without a traceback.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from msft_store import StoreError
from trainer.cli.logs import show_log
from trainer.cli.predictions import select_predictions, to_text
from trainer.comparison.compare import compare
from trainer.comparison.report import summaries_by_method
from trainer.comparison.tables import describe_failures, render_text
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.examples import Example
from trainer.data.load import load_mixture
from trainer.distributed import is_peer_failure, this_process
from trainer.errors import PausedError, TrainerError, first_line
from trainer.journal import effective, read
from trainer.model.lora import load_for_training
from trainer.model.metrics import load_metrics
from trainer.report.flops import ModelSize
from trainer.report.headroom import diagnose
from trainer.report.headroom_table import headroom_notes, headroom_table
from trainer.report.plan import Counts, Plan, plan
from trainer.report.report import DIVERGED, NEVER_MEASURED, NEVER_RIGHT, compare_table, write_report
from trainer.report.summary import Summary, summarize
from trainer.signals import Interrupted
from trainer.simulate.policies import OPTIONS, expand_sweeps
from trainer.simulate.report import simulate_own_policy, simulate_policy
from trainer.simulate.report import to_text as simulation_text
from trainer.text import printable
from trainer.training.directory import JOURNAL
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
  4    no answer was ever right, or no metric ever gave a number; the run is over, and its result
       was chosen by the loss, if there is one
  5    diagnose: MSFT would win nothing
  75   paused: the disk or max_disk has no room; one sentence on stderr says what is needed; then
       continue with `msft-train resume RUN`
  130  interrupted by SIGINT (143 by SIGTERM); continue with `msft-train resume RUN`
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse leaves the overrides that follow an option in ``rest``.
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
        if not is_peer_failure(error):
            raise
        _complain(
            "another process of this run has ended; see its last lines, then continue with "
            "`msft-train resume RUN`"
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
    for name, (command, add_arguments, text, example) in _COMMANDS.items():
        one = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  msft-train {name} {example}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(command=command)
        add_arguments(one)
        one.add_argument("--json", action="store_true", help="print the result as JSON")
        one.add_argument("--quiet", action="store_true", help="no progress on stderr")
        one.add_argument(
            "-v",
            "--verbose",
            action="count",
            default=0,
            help="show the store's log too; twice: details",
        )
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the directory of a run")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="overrides, as in train.lr=2e-5",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--methods",
        default="sft,msft",
        metavar="NAMES",
        help="methods, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="N runs of each method: the seed, seed + 1, …"
    )
    parser.add_argument(
        "--budgets",
        type=_numbers,
        default=(),
        metavar="C,…",
        help="values of msft.compute_budget, separated by commas (default: the configured one)",
    )
    parser.add_argument(
        "--equal-compute",
        action="store_true",
        help="run every other method also with the C that needs about as many FLOPs as MSFT",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="N runs at once (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-models",
        action="store_true",
        help="keep model/ of every run also with the options above; the stores have it anyway",
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _add_predictions(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--at",
        metavar="STAGE-EPOCH",
        help="the evaluation (default: that of the result, or the newest)",
    )
    parser.add_argument("--sub-dataset", metavar="NAME", help="only those of one sub-dataset")
    parser.add_argument("--all", action="store_true", help="show the right ones, too")
    parser.add_argument(
        "--limit",
        type=int,
        default=10,
        metavar="N",
        help="N of each sub-dataset as text; JSON has all (default: %(default)s)",
    )


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("journal", metavar="JOURNAL", help="the directory of a run, or its journal")
    for key, text in OPTIONS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", dest=key, metavar="VALUE", help=text)
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="several values of an option above, as in peak-window=2,4,off; repeated: all pairs",
    )
    parser.add_argument(
        "--method",
        choices=("msft", "sft"),
        default="msft",
        help="the method whose decisions are replayed; sft: the first stage only",
    )
    parser.add_argument(
        "--retention",
        default="needs",
        metavar="RULE",
        help="rollback points to keep: needs (those that the method may still use; the default), "
        "last:K, best:K (by the overall metric), all",
    )


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    return _show_end(options, start(config, progress=not options.quiet))


def _resume(options: argparse.Namespace) -> int:
    return _show_end(options, resume(options.run, progress=not options.quiet))


def _show_end(options: argparse.Namespace, summary: Summary) -> int:
    """Print the summary of a run and return the exit code."""
    _print_summary(options, summary)
    return _complain_of(summary)


def _complain_of(summary: Summary) -> int:
    """Say that the run diverged or measured nothing, and return the exit code of that."""
    if summary.never_right:
        _complain(f"{summary.method}: {NEVER_RIGHT}")
    if summary.diverged:
        _complain(f"{summary.method}: {DIVERGED}")
    elif summary.never_measured:
        _complain(f"{summary.method}: {NEVER_MEASURED}")
    return 3 if summary.diverged else 4 if summary.never_right or summary.never_measured else 0


def _report(options: argparse.Namespace) -> None:
    _print_summary(options, write_report(options.run))


def _diagnose(options: argparse.Namespace) -> int:
    records = read(Path(options.run) / JOURNAL)
    found = diagnose(effective(records))
    text = "\n\n".join([headroom_table(found).to_text(), "\n".join(headroom_notes(found))])
    _print(found.to_dict() if options.json else text)
    return _complain_of(summarize(records)) or (0 if found.may_pay else 5)


def _predictions(options: argparse.Namespace) -> None:
    found = select_predictions(
        options.run, at=options.at, sub_dataset=options.sub_dataset, every=options.all
    )
    _print(found.to_dict() if options.json else to_text(found, limit=options.limit))


def _compare(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    try:
        comparison = compare(
            config,
            options.methods.split(","),
            seeds=options.seeds,
            budgets=options.budgets,
            equal_compute=options.equal_compute,
            jobs=options.jobs,
            keep_models=options.keep_models,
            progress=not options.quiet,
        )
    except Interrupted as interrupted:
        _complain(f"{interrupted}; give the same command again to continue")
        return 128 + interrupted.number
    tree: dict[str, Any]
    if summaries := summaries_by_method(comparison):
        tree = {label: summary.to_dict() for label, summary in summaries.items()}
        text = compare_table(summaries)
    else:
        tree, text = comparison.to_dict(), render_text(comparison)
    _print(tree if options.json else text)
    for remark in describe_failures(comparison):
        _complain(remark)
    return 1 if comparison.failures else 3 if comparison.diverged else 0


def _simulate(options: argparse.Namespace) -> None:
    path = Path(options.journal)
    records = read(path / JOURNAL if path.is_dir() else path)
    given = {key: value for key in OPTIONS if (value := getattr(options, key)) is not None}
    run = simulate_own_policy(records)
    outcomes = [
        simulate_policy(records, policy, method=options.method, retention=options.retention)
        for policy in expand_sweeps(given, options.sweep)
    ]
    tree = {"run": run.to_dict(), "policies": [one.to_dict() for one in outcomes]}
    _print(tree if options.json else simulation_text(run, outcomes))


def _plan(options: argparse.Namespace) -> None:
    found = make_plan(load_config(options.config, options.overrides))
    tree = {**asdict(found), "rollback_bytes": found.rollback_bytes}
    _print(tree if options.json else found.to_text())


_Command = tuple[
    Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser], None], str, str
]
"""What runs it and what adds its arguments; its help text, and the arguments of an example."""

_COMMANDS: dict[str, _Command] = {
    "run": (_run, _add_config, "begin a run", "config.yaml train.lr=2e-5 seed=1"),
    "resume": (_resume, _add_run, "continue a run after a kill", "runs/demo"),
    "plan": (
        _plan,
        _add_config,
        "say what a run takes at most: steps, FLOPs, disk",
        "config.yaml msft.compute_budget=5",
    ),
    "report": (
        _report,
        _add_run,
        "write report, plots and result.json of a run again",
        "runs/demo",
    ),
    "diagnose": (
        _diagnose,
        _add_run,
        "say whether MSFT would win something over a run of plain SFT",
        "runs/sft",
    ),
    "predictions": (
        _predictions,
        _add_predictions,
        "show the generations of an evaluation that are not right",
        "runs/demo --sub-dataset arith",
    ),
    "compare": (
        _compare,
        _add_comparison,
        "run several methods and set them side by side",
        "config.yaml --methods sft,msft",
    ),
    "simulate": (
        _simulate,
        _add_simulation,
        "replay other policies on the curves of a recorded run",
        "runs/demo --sweep peak-window=2,4,off",
    ),
}


def make_plan(config: Config) -> Plan:
    """Load the data and the model of a configuration, and return the upper limits of its run."""
    loaded = load_for_training(config)
    mixture = load_mixture(
        config.data, loaded.tokenizer, max_validation=config.evaluation.max_examples
    )
    metrics = load_metrics(config, mixture).metrics
    check_compatibility(config, loaded, mixture, metrics)
    counts = {}
    for name, sub in mixture.items():
        passes = _lengths(sub.validation.examples)
        if metrics[name].generates:
            passes += [len(example.prompt) for example in sub.validation.examples]
        counts[name] = Counts(
            train=len(sub.train.examples),
            train_tokens=sum(_lengths(sub.train.examples)),
            train_attention_tokens=sum(n * n for n in _lengths(sub.train.examples)),
            validation=len(sub.validation.examples),
            validation_tokens=sum(passes),
            validation_attention_tokens=sum(n * n for n in passes),
            generates=metrics[name].generates,
            too_long=sub.too_long,
            cut=sub.cut,
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


def _print_summary(options: argparse.Namespace, summary: Summary) -> None:
    _print(summary.to_dict() if options.json else compare_table({summary.method.upper(): summary}))


def _print(result: Any) -> None:
    if this_process().is_main_process:
        text = result if isinstance(result, str) else json.dumps(result, indent=2)
        print(text, flush=True)


def _complain(sentence: str) -> None:
    print(printable(f"msft-train: {sentence}"), file=sys.stderr)


def _sentence(error: BaseException) -> str:
    """Return the first line of an error; for a system error, its file and its meaning."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return first_line(error)
