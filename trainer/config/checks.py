"""Check a configuration before any model or data is loaded.

Example::

    check_settings(config)                                      # raises ConfigError
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.data_paths import RELATIVE, SPLITS, Source
from trainer.config.mixture_file import ANSWER_PATTERN
from trainer.config.schema import (
    OVERALL,
    Config,
    DataConfig,
    EvalConfig,
    FieldsConfig,
    SourceConfig,
    SubDatasetConfig,
)
from trainer.config.templates import check
from trainer.errors import ConfigError, DataError
from trainer.text import did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""An id on the hub: ``name`` or ``owner/name``."""


def check_data(config: Config) -> None:
    """Raise :class:`ConfigError` for the first invalid setting of the data."""
    data = config.data
    if not data.sub_datasets:
        raise ConfigError("data.sub_datasets is empty: name at least one sub-dataset and its files")
    if (data.sampling == "temperature") != (data.temperature is not None):
        raise ConfigError(
            "data.temperature belongs to data.sampling=temperature: give both or neither"
        )
    evaluation = config.evaluation
    for name, files in data.sub_datasets.items():
        metric = files.metric or evaluation.metric
        exact = metric == "exact_match" and evaluation.answer_pattern is None
        _check_sub_dataset(f"data.sub_datasets.{name}", name, files, data)
        sources = (files.train, files.validation, files.test)
        has_mixture = any(isinstance(one, SourceConfig) and one.category for one in sources)
        if exact and files.fields is None and has_mixture:
            raise ConfigError(
                "the answers in mixture files follow '####': set evaluation.answer_pattern, as in "
                f"'{ANSWER_PATTERN}'"
            )


def check_name(at: str, name: str) -> None:
    """Raise :class:`ConfigError` if a sub-dataset cannot have a name; ``at`` says where it is."""
    if name == OVERALL:
        raise ConfigError(f"{at}: {OVERALL!r} names the metric of the whole mixture; rename it")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{at}: a name begins with a letter or digit, and consists of letters, digits, "
            "'_' and '-', at most 64 of them; rename it"
        )


def _check_sub_dataset(at: str, name: str, files: SubDatasetConfig, data: DataConfig) -> None:
    check_name(at, name)
    if files.validation is None and data.validation_share is None:
        raise ConfigError(
            f"{at}.validation is missing: peaks are found on validation data; name a source, or "
            "set data.validation_share to set some of the training examples aside"
        )
    for split in SPLITS:
        source: Source | None = getattr(files, split)
        if source is not None:
            _check_source(f"{at}.{split}", source)
    if files.fields is not None:
        _check_fields(f"{at}.fields", files.fields)


def _check_source(at: str, source: Source) -> None:
    if isinstance(source, str):
        source = SourceConfig(file=source)
    if (source.file is None) == (source.hub is None):
        raise ConfigError(f"{at} must have either 'file' or 'hub'")
    if source.file is not None:
        if source.config is not None or source.revision is not None or source.split != "train":
            raise ConfigError(f"{at}: config, split and revision go with 'hub', not with 'file'")
        if source.part is not None and source.category is None:
            raise ConfigError(f"{at}: 'part' goes with 'category'")
        if not Path(source.file).is_file():
            raise ConfigError(f"{at}: there is no file {source.file}; {RELATIVE}")
    elif source.category is not None or source.part is not None:
        raise ConfigError(f"{at}: category and part go with 'file', not with 'hub'")
    elif not Path(source.hub or "").is_dir() and not HUB_ID.fullmatch(source.hub or ""):
        raise ConfigError(f"{at}.hub: {source.hub!r} is neither a directory nor an id (owner/name)")


def _check_fields(at: str, fields: FieldsConfig) -> None:
    given = {key: template for key, template in vars(fields).items() if template is not None}
    if given.keys() not in ({"prompt", "completion"}, {"text"}, {"messages"}):
        raise ConfigError(f"{at} must have prompt and completion, or text or messages alone")
    for key, template in given.items():
        if key == "messages":
            if "{" in template:
                raise ConfigError(f"{at}.messages is the name of a column, without braces")
            continue
        try:
            check(template)
        except DataError as error:
            raise ConfigError(f"{at}.{key}: {error}") from None


TRACKERS = (
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)
"""The trackers that Accelerate knows, each by the name of its package."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(x|kB|MB|GB|TB)")
_MAX_EVALUATIONS = 1_000_000


def to_bytes(size: str, full_bytes: int) -> int | None:
    """Return a size such as ``500MB`` or ``1.5x`` in bytes; ``None`` if it is not a size.

    ``x`` counts full checkpoints of ``full_bytes``.
    """
    found = _SIZE.fullmatch(size)
    if found is None or not float(found[1]):
        return None
    units = {"x": full_bytes, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return max(int(float(found[1]) * units[found[2]]), 1)


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seed", lambda n: 0 <= n < 2**32, "from 0 to 2**32 - 1"),
    ("threads", lambda n: 1 <= n <= 1024, "from 1 to 1024, or null for torch's default"),
    ("resume_every", lambda n: n >= 1, "at least 1"),
    ("max_disk", lambda text: to_bytes(text, 1) is not None, "such as 500MB, 2GB or 1.5x, or null"),
    ("log_every", lambda n: n >= 1, "at least 1"),
    ("data.max_length", lambda n: n >= 2, "at least 2"),
    ("data.max_examples", lambda n: n >= 1, "at least 1, or null for all"),
    ("data.validation_share", lambda x: 0 < x < 1, "above 0 and below 1, or null for none"),
    ("data.seed", lambda n: 0 <= n < 2**32, "from 0 to 2**32 - 1"),
    ("data.temperature", lambda x: x > 0, "above 0, or null"),
    ("lora.r", lambda n: n >= 1, "at least 1"),
    ("lora.alpha", lambda n: n >= 1, "at least 1"),
    ("lora.dropout", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("lora.target_modules", lambda names: names and all(names), "names, or null for all layers"),
    ("lora.modules_to_save", lambda names: names and all(names), "names, or null for none"),
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
    ("evaluation.excluded_every", lambda n: n >= 1, "at least 1"),
    ("evaluation.max_new_tokens", lambda n: n >= 1, "at least 1"),
    ("evaluation.batch_size", lambda n: n >= 1, "at least 1"),
    ("evaluation.max_examples", lambda n: n >= 1, "at least 1, or null for all"),
    ("evaluation.predictions", lambda n: n >= 0, "at least 0"),
    ("msft.compute_budget", lambda x: x > 0, "above 0"),
    ("msft.peak_window", lambda n: n >= 1, "at least 1, or null for the paper's rule"),
    ("msft.max_stages", lambda n: n >= 1, "at least 1, or null for twice the sub-datasets"),
    ("msft.overall_window", lambda n: n >= 1, "at least 1, or null for the paper's rule"),
    ("msft.drop_count", lambda n: n >= 1, "at least 1"),
    ("msft.drop_passed", lambda n: n >= 1, "at least 1"),
    ("msft.floor", lambda x: 0 < x < 1, "above 0 and below 1"),
    ("msft.return_margin", lambda x: x >= 0, "0 or above, or null for never"),
    ("msft.rollback_average", lambda n: n >= 1, "at least 1"),
    ("msft.rollback_margin", lambda x: x >= 0, "0 or above, or null for no roll-backs"),
    ("msft.restart_warmup", lambda x: x >= 0, "0 or above"),
    ("msft.smoothing", lambda n: n >= 1, "at least 1"),
    ("msft.margin", lambda x: x >= 0, "0 or above"),
    ("msft.patience", lambda n: n >= 1, "at least 1"),
    ("average.count", lambda n: n >= 2, "at least 2"),
    ("ies.delta", lambda x: x > 0, "above 0"),
    ("ies.average", lambda n: n >= 1, "at least 1"),
    ("dynamix.gamma", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("dynamix.alpha", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("dynamix.beta", lambda x: x >= 0, "0 or above"),
    ("dynamix.every", lambda n: n >= 1, "at least 1"),
    ("dynamix.examples", lambda n: n >= 1, "at least 1, or null for train.micro_batch_size"),
)


def check_ranges(config: Config) -> None:
    """Raise :class:`ConfigError` for the first value that is out of its range."""
    for key, sound, words in _RANGES:
        value: Any = config
        for name in key.split("."):
            value = None if value is None else getattr(value, name)
        if value is not None and not sound(value):
            raise ConfigError(f"{key} must be {words}, got {value!r}")


def check_settings(config: Config) -> None:
    """Raise :class:`ConfigError` for the first invalid value."""
    check_ranges(config)
    check_data(config)
    _check_trackers(config.log_with)
    _check_model(config)
    _check_precision(config)
    train, evaluation, budget = config.train, config.evaluation, config.msft.compute_budget
    if train.batch_size > train.micro_batch_size and train.batch_size % train.micro_batch_size:
        raise ConfigError(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}), or not larger"
        )
    _check_evaluations(evaluation, budget)
    if config.restores_optimizer:
        averages = {"average.kind": config.average.kind != "none"}
        averages["msft.rollback_average"] = config.msft.rollback_average > 1
        for key in (key for key, is_set in averages.items() if is_set):
            raise ConfigError(
                f"{key} averages weights, and msft.optimizer_on_rollback: restore needs the "
                "optimizer's state of one step: use reset, or remove it"
            )
    if evaluation.answer_pattern is not None:
        _check_pattern(evaluation.answer_pattern)


def _check_evaluations(evaluation: EvalConfig, budget: float) -> None:
    """Raise :class:`ConfigError` for a roll-out, of ``budget`` epochs, without evaluations."""
    every = evaluation.eval_every
    if evaluation.cadence == "steps":
        if not every.is_integer():
            raise ConfigError(
                f"evaluation.eval_every must be a whole number of steps with evaluation.cadence "
                f"steps, got {every:g}"
            )
        return
    if budget < every:
        raise ConfigError(
            f"msft.compute_budget ({budget:g} epochs) must hold at least one evaluation: raise it, "
            f"or lower evaluation.eval_every ({every:g} epochs)"
        )
    if budget > _MAX_EVALUATIONS * every:
        raise ConfigError(
            f"msft.compute_budget ({budget:g} epochs) would be more than {_MAX_EVALUATIONS:,} "
            f"evaluations a roll-out: lower it, or raise evaluation.eval_every ({every:g} epochs)"
        )


def _check_model(config: Config) -> None:
    """Raise :class:`ConfigError` for a setting of the model that has no effect or cannot work."""
    model = config.model
    if model.revision is not None and Path(model.path).is_dir():
        raise ConfigError(
            f"model.revision goes with an id on the hub, but model.path {model.path} is a "
            "directory: remove one of the two"
        )
    if model.quantization is None:
        return
    if config.lora is None:
        raise ConfigError(
            f"model.quantization {model.quantization} is for frozen weights: set lora, whose "
            "adapter is trained on top of them, or remove it"
        )
    package = {"nf4": "bitsandbytes", "int8": "torchao"}[model.quantization]
    if find_spec(package) is None:
        raise ConfigError(
            f"model.quantization {model.quantization} needs {package}, which is not installed: "
            f"`pip install {package}`, or remove it"
        )


def _check_precision(config: Config) -> None:
    """Raise :class:`ConfigError` if dtypes contradict each other, or one has no effect."""
    if config.model.dtype == "float16":
        raise ConfigError(
            "model.dtype float16 would need a loss scaler, for its small gradients vanish: use "
            "bfloat16, or float32 with train.compute_dtype bfloat16"
        )
    key, trained = "model.dtype", config.model.dtype
    if config.lora is not None:
        key, trained = "lora.dtype", config.lora.dtype
    if config.train.compute_dtype is not None and "float32" not in (config.model.dtype, trained):
        raise ConfigError(
            "train.compute_dtype is for weights in float32: remove it, or set model.dtype float32"
        )
    if config.train.stochastic_rounding and trained != "bfloat16":
        raise ConfigError(
            f"train.stochastic_rounding is for weights in bfloat16, but {key} is {trained}: remove "
            "it"
        )
    if config.train.optimizer.endswith("bit") and find_spec("torchao") is None:
        raise ConfigError(
            f"train.optimizer {config.train.optimizer} needs torchao, which is not installed: `pip "
            "install torchao`, or take adam"
        )
    if config.snapshot_dtype is not None and trained != "float32":
        raise ConfigError(
            f"snapshot_dtype {config.snapshot_dtype} rounds nothing, because {key} is {trained}: "
            f"remove it, or set {key} float32"
        )


def _check_trackers(names: Sequence[str]) -> None:
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"log_with must name trackers, of {', '.join(TRACKERS)}; got {name!r}"
                + did_you_mean(name, TRACKERS)
            )
        if find_spec(name) is None:
            raise ConfigError(
                f"log_with names {name!r}, which is not installed: `pip install "
                f"{name.replace('_', '-')}`, or remove it from log_with"
            )


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
