"""The configuration of a run: small frozen dataclasses, read from one YAML file.

Relative paths are taken from the folder of the YAML file, ``output_dir`` from the working
directory. An unknown key is an error that names the nearest valid one.

Example::

    config = load_config("examples/stdlib_tasks/demo.yaml", overrides=["train.lr=1e-5", "seed=1"])
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trainer.errors import ConfigError
from trainer.strategy import OVERALL
from trainer.typed import build
from trainer.yamlfile import override, read_yaml, write_yaml

_TRAIN = ".train.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(x|kB|MB|GB|TB)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is fine-tuned (``model:``)."""

    path: str
    """A directory, or a hub id, that ``AutoModelForCausalLM`` loads."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of the weights in training; the paper's is bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    attn_implementation: str | None = None
    """Passed to transformers; ``None`` leaves the choice to it."""


@dataclass(frozen=True, kw_only=True)
class SubDatasetConfig:
    """The JSON Lines files of one sub-dataset."""

    train: str
    """Training examples."""
    validation: str
    """Examples on which peaks are found."""
    test: str | None = None
    """Examples that are evaluated once, at the end."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture (``data:``)."""

    sub_datasets: Mapping[str, SubDatasetConfig] = field(default_factory=dict)
    """Name → files."""
    directory: str | None = None
    """Instead of ``sub_datasets``: a directory in which every ``NAME.train.jsonl`` with its
    ``NAME.validation.jsonl`` and optional ``NAME.test.jsonl`` is one; loading spells it out."""
    max_length: int = 512
    """Tokens; a longer example is dropped, counted and reported."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization (``train:``)."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam (the paper's) or AdamW, with moments in the dtype of the weights."""
    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    eps: float = 1e-8
    """Added to the denominator of an update."""
    weight_decay: float = 0.0
    """Of matrices alone. Added to the gradient with Adam, taken off the weights with AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over a stage, after warm-up."""
    warmup_ratio: float = 0.0
    """Share of a stage's steps in which the learning rate rises from 0."""
    batch_size: int = 64
    """Examples per optimizer step, over all processes."""
    micro_batch_size: int = 16
    """Examples per forward pass and process."""
    max_grad_norm: float | None = None
    """Gradient norm above which gradients are scaled down; ``None``: no clipping."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """What follows a loss or gradient norm that is not finite. ``stop``: the run ends with the best
    overall so far as its result. ``rollback``: the weights of the last evaluation are restored, the
    batches since then left out; this keeps one more rollback point."""
    max_skips: int = 3
    """How many times a run may roll back for that reason; after them, it stops."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation (``evaluation:``)."""

    metric: Literal["exact_match", "loss"] = "exact_match"
    """``exact_match``: share of greedy generations whose answer is right (``max``);
    ``loss``: mean token loss on the completion (``min``)."""
    eval_every: float = 0.25
    """Epochs of the active mixture between evaluations."""
    answer_pattern: str | None = None
    """Regular expression; its first group is the answer in generations and references alike
    (the last match counts). ``None``: the whole completion, stripped."""
    max_new_tokens: int = 64
    """Tokens after which a generation ends, whether or not it has an answer."""
    batch_size: int = 64
    """Examples per forward pass in evaluation."""
    max_examples: int | None = None
    """Validation examples used of each sub-dataset, the first ones; ``None``: all."""
    overall: Literal["examples", "sub_datasets"] = "examples"
    """Mean over examples (the paper's code) or over sub-datasets."""


@dataclass(frozen=True, kw_only=True)
class MsftConfig:
    """The MSFT algorithm (``msft:``); ``sft`` uses ``compute_budget`` alone."""

    compute_budget: float = 3.0
    """C: epochs of the active mixture in one roll-out."""
    peak_window: int | None = None
    """W: end a roll-out when the earliest champion is W evaluations old; ``None``: the paper."""
    max_stages: int | None = None
    """``None``: twice the number of sub-datasets."""
    optimizer_on_rollback: Literal["reset", "restore"] = "reset"
    """``reset``: each stage begins with a fresh optimizer, schedule and order of examples (the
    paper's code). ``restore``: it goes on with those of the checkpoint that it begins from, and
    with its random number generators; a rollback point then holds the optimizer's state, too."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    method: Literal["msft", "sft"] = "msft"
    output_dir: str
    """The run directory: store, journal, report, result."""
    seed: int = 0
    """Of the order of examples and of all random number generators."""
    threads: int | None = None
    """CPU threads for torch; ``None`` leaves torch's default."""
    resume_every: int | None = None
    """Optimizer steps between resume points; ``None``: none, a killed run repeats its stage."""
    async_save: bool = True
    """Commit checkpoints in the background while training goes on, which takes host memory for one
    copy of the weights; ``false``: train on once each is committed. The results are the same."""
    resident_reference: bool = False
    """Keep a second copy of the weights on their device, those that a stage starts from, and find
    there what a checkpoint changed instead of on the CPU. For GPUs; the results are the same."""
    max_disk: str | None = None
    """What the store of the rollback points may take at most, temporary files included: bytes as in
    ``500MB`` or ``2GB``, or full checkpoints as in ``1.5x``. A run that needs more pauses.
    ``None``: no limit but the disk's."""
    log_every: int = 10
    """Optimizer steps between ``trained`` records in the journal."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    msft: MsftConfig = MsftConfig()

    @property
    def restores_optimizer(self) -> bool:
        """Whether rollback points hold more than weights."""
        return self.method != "sft" and self.msft.optimizer_on_rollback == "restore"


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", lambda n: 0 <= n < 2**32, "from 0 to 2**32 - 1"),
    ("threads", lambda n: 1 <= n <= 1024, "from 1 to 1024, or null for torch's default"),
    ("resume_every", lambda n: n >= 1, "at least 1"),
    ("max_disk", lambda text: to_bytes(text, 1) is not None, "such as 500MB, 2GB or 1.5x, or null"),
    ("log_every", lambda n: n >= 1, "at least 1"),
    ("data.max_length", lambda n: n >= 2, "at least 2"),
    ("train.lr", lambda x: x > 0, "above 0"),
    ("train.betas", lambda pair: all(0 <= x < 1 for x in pair), "two numbers from 0 to below 1"),
    ("train.eps", lambda x: x > 0, "above 0"),
    ("train.weight_decay", lambda x: x >= 0, "0 or above"),
    ("train.warmup_ratio", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("train.batch_size", lambda n: n >= 1, "at least 1"),
    ("train.micro_batch_size", lambda n: n >= 1, "at least 1"),
    ("train.max_grad_norm", lambda x: x > 0, "above 0, or null for no clipping"),
    ("train.max_skips", lambda n: n >= 1, "at least 1"),
    ("evaluation.eval_every", lambda x: x > 0, "above 0"),
    ("evaluation.max_new_tokens", lambda n: n >= 1, "at least 1"),
    ("evaluation.batch_size", lambda n: n >= 1, "at least 1"),
    ("evaluation.max_examples", lambda n: n >= 1, "at least 1, or null for all"),
    ("msft.compute_budget", lambda x: x > 0, "above 0"),
    ("msft.peak_window", lambda n: n >= 1, "at least 1, or null for the paper's rule"),
    ("msft.max_stages", lambda n: n >= 1, "at least 1, or null for twice the sub-datasets"),
)


def to_bytes(size: str, full_bytes: int) -> int | None:
    """Return a size such as ``500MB`` or ``1.5x`` in bytes; ``None`` if it is none.

    ``x`` counts full checkpoints of ``full_bytes``.
    """
    found = _SIZE.fullmatch(size)
    if found is None or not float(found[1]):
        return None
    units = {"x": full_bytes, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return max(int(float(found[1]) * units[found[2]]), 1)


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
        _check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values."""
    tree: dict[str, Any] = asdict(config)
    tree["train"]["betas"] = list(config.train.betas)
    return tree


def dump(config: Config) -> str:
    """Return the configuration as YAML that :func:`load_config` reads to the same again."""
    return write_yaml(to_dict(config))


def _resolve(config: Config, folder: Path) -> Config:
    """Make paths absolute and spell out ``data.directory``."""
    data = config.data
    if data.directory is not None and data.sub_datasets:
        raise ConfigError("data.directory and data.sub_datasets exclude each other: remove one")
    if data.directory is not None:
        sub_datasets = _scan(folder / data.directory)
    else:
        sub_datasets = {
            name: SubDatasetConfig(
                train=str(folder / files.train),
                validation=str(folder / files.validation),
                test=None if files.test is None else str(folder / files.test),
            )
            for name, files in data.sub_datasets.items()
        }
    return replace(
        config,
        output_dir=str(Path(config.output_dir).absolute()),
        model=replace(config.model, path=_model_path(config.model.path, folder)),
        data=replace(data, sub_datasets=sub_datasets, directory=None),
    )


def _scan(directory: Path) -> dict[str, SubDatasetConfig]:
    """Return the sub-datasets of a directory by their file names, sorted."""
    if not directory.is_dir():
        raise ConfigError(f"data.directory: there is no directory {directory}")
    found = {}
    for train in sorted(directory.glob(f"*{_TRAIN}")):
        name = train.name[: -len(_TRAIN)]
        test = directory / f"{name}.test.jsonl"
        found[name] = SubDatasetConfig(
            train=str(train),
            validation=str(directory / f"{name}.validation.jsonl"),
            test=str(test) if test.is_file() else None,
        )
    if not found:
        raise ConfigError(f"data.directory: no file in {directory} is named NAME{_TRAIN}")
    return found


def _model_path(path: str, folder: Path) -> str:
    """Return an absolute path where ``path`` is a directory, and a hub id as it stands."""
    if (folder / path).exists():
        return str(folder / path)
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path: there is no directory {folder / path}")
    return path


def _check(config: Config) -> None:
    """Raise :class:`ConfigError` for the first value that cannot work."""
    for key, sound, words in _RANGES:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None and not sound(value):
            raise ConfigError(f"{key} must be {words}, got {value!r}")
    _check_sub_datasets(config.data.sub_datasets)
    train, evaluation, budget = config.train, config.evaluation, config.msft.compute_budget
    if train.batch_size > train.micro_batch_size and train.batch_size % train.micro_batch_size:
        raise ConfigError(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}), or not larger"
        )
    if budget < evaluation.eval_every:
        raise ConfigError(
            f"msft.compute_budget ({budget:g} epochs) must hold at least one evaluation: raise it, "
            f"or lower evaluation.eval_every ({evaluation.eval_every:g} epochs)"
        )
    if evaluation.answer_pattern is not None:
        _check_pattern(evaluation.answer_pattern)


def _check_sub_datasets(sub_datasets: Mapping[str, SubDatasetConfig]) -> None:
    if not sub_datasets:
        raise ConfigError("data.sub_datasets is empty: name at least one sub-dataset and its files")
    for name, files in sub_datasets.items():
        at = f"data.sub_datasets.{name}"
        if name == OVERALL:
            raise ConfigError(f"{at}: {OVERALL!r} names the metric of the whole mixture; rename it")
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{at}: a name begins with a letter or digit, and consists of letters, digits, "
                "'_' and '-', at most 64 of them; rename it"
            )
        for part in ("train", "validation", "test"):
            file = getattr(files, part)
            if file is not None and not Path(file).is_file():
                raise ConfigError(f"{at}.{part}: there is no file {file}")


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(
            f"evaluation.answer_pattern {pattern!r} is not a regular expression: {error}"
        ) from None
    if groups == 0:
        raise ConfigError(
            f"evaluation.answer_pattern {pattern!r} has no group: put the answer into parentheses"
        )
