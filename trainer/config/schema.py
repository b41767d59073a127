"""Every key of a configuration, with its default and meaning: small frozen dataclasses.

Example::

    TrainConfig(lr=2e-5).schedule                               # constant
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

OVERALL = "overall"
"""The name under which the metric of the whole mixture is recorded; no sub-dataset may have it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to fine-tune (``model:``)."""

    path: str
    """A directory, or a hub id, that ``AutoModelForCausalLM`` loads."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Dtype of the weights in training; the paper's is bfloat16. float16 is refused: its gradients
    would have to be scaled."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    attn_implementation: str | None = None
    """Passed to transformers; ``None`` leaves the choice to it."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (``lora:``), trained instead of the model's weights."""

    r: int = 16
    """Rank of the update of each layer."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Of the adapter's input, in training."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get one, as in ``[q_proj, v_proj]``; ``None``: all linear layers but
    the output layer."""
    rslora: bool = False
    """Scale by alpha / √r instead."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the adapter in training; the model's is ``model.dtype``."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of rows, for more than the path of a file."""

    file: str | None = None
    """A JSON Lines or Parquet file, or with ``category`` a mixture file."""
    category: str | None = None
    """Of a mixture file (see ``data.mixture``): the rows of this category."""
    part: str | None = None
    """Of a mixture file that holds several lists: the list; ``None``: that of the split's name."""
    hub: str | None = None
    """Instead of ``file``: a data set that the ``datasets`` package loads, by its id on the hub, or
    a directory of one."""
    config: str | None = None
    """The configuration (subset) of that data set."""
    split: str = "train"
    """The split of that data set, also a slice such as ``train[:90%]``."""
    revision: str | None = None
    """The revision of that data set on the hub; ``None``: the newest."""


@dataclass(frozen=True, kw_only=True)
class FieldsConfig:
    """Templates that make examples of a row's columns, see :mod:`trainer.config.templates`."""

    prompt: str | None = None
    """The text to condition on, as in ``"Q: {question}\\nA:"``; with ``completion``."""
    completion: str | None = None
    """The text to train on, as in ``" {answer}"``."""
    text: str | None = None
    """Instead of the two: text of which all tokens are trained on."""


@dataclass(frozen=True, kw_only=True)
class SubDatasetConfig:
    """One sub-dataset: JSON Lines or Parquet (``.parquet``) files, or other sources."""

    train: str | SourceConfig
    """Training examples."""
    validation: str | SourceConfig | None = None
    """Examples on which peaks are found; ``None``: what ``data.validation_share`` sets aside."""
    test: str | SourceConfig | None = None
    """Examples that are evaluated once, at the end."""
    fields: FieldsConfig | None = None
    """``None``: rows have ``prompt`` and ``completion``, ``messages``, or ``text`` as they are."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture in one JSON file a split, or in one file (:mod:`trainer.config.mixture_file`)."""

    train: str | SourceConfig
    """Training examples; the categories in it are the sub-datasets."""
    validation: str | SourceConfig | None = None
    """``None``: some training examples are set aside, ``data.validation_share``."""
    test: str | SourceConfig | None = None
    """Examples that are evaluated once, at the end."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture (``data:``)."""

    sub_datasets: Mapping[str, SubDatasetConfig] = field(default_factory=dict)
    """Name → sources."""
    directory: str | None = None
    """Instead of ``sub_datasets``: a directory in which every ``NAME.train.jsonl`` with its
    ``NAME.validation.jsonl`` and optional ``NAME.test.jsonl`` is one; loading spells it out."""
    mixture: MixtureConfig | None = None
    """Instead of ``sub_datasets``: mixture files; loading spells them out."""
    max_length: int = 512
    """Tokens; a longer example is dropped, counted and reported."""
    max_examples: int | None = None
    """Training examples used of each sub-dataset, chosen at random; ``None``: all."""
    validation_share: float | None = None
    """Of a sub-dataset without validation data: what is set aside for it, at random, of its
    training examples; with ``max_examples`` that share of these, and on top of them."""
    seed: int = 0
    """Of these two choices. Not the run's: runs that differ in that have the same examples."""
    sampling: Literal["proportional", "equal", "temperature"] = "proportional"
    """How much of each sub-dataset an epoch has: every example once; as much of each; or
    proportional to its size to the power of 1 / ``temperature``. An epoch's length is the same."""
    temperature: float | None = None
    """For ``sampling: temperature``; 1 is ``proportional``, a high one nearly ``equal``."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization (``train:``)."""

    compute_dtype: Literal["bfloat16"] | None = None
    """Compute with float32 weights in this dtype, by autocast: faster where the device has it, and
    small updates are not lost in the weights. ``None``: in the dtype of the weights."""
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
    """Reaction to a loss or gradient norm that is not finite. ``stop``: the run ends with the best
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
    """The MSFT algorithm (``msft:``); the other methods use ``compute_budget`` alone."""

    compute_budget: float = 3.0
    """C: epochs of the active mixture in one roll-out; of each sub-dataset with ``continual``."""
    peak_window: int | None = None
    """W: end a roll-out when the earliest champion is W evaluations old; ``None``: the paper."""
    max_stages: int | None = None
    """``None``: twice the number of sub-datasets."""
    drop_count: int = 1
    """Sub-datasets that are excluded at once at most, of those whose peaks have passed."""
    exclusion: Literal["hard", "soft"] = "hard"
    """``hard``: an excluded sub-dataset is trained on no longer (the paper). ``soft``: with the
    share ``floor`` of its examples in each epoch, against forgetting."""
    floor: float = 0.1
    """Share of an excluded sub-dataset's examples in an epoch, with ``exclusion: soft``."""
    peaks: Literal["first_best", "robust"] = "first_best"
    """``first_best``: the first best value is the peak, and it has passed if another evaluation
    follows (the paper). ``robust``: the next three keys apply."""
    smoothing: int = 3
    """Evaluations whose mean stands for a value, with ``peaks: robust``; 1: none."""
    margin: float = 1.0
    """Standard errors of the metric by which a value must beat the best one so far to be better,
    with ``peaks: robust``."""
    patience: int = 2
    """Evaluations without anything better after which a peak has passed, with ``peaks: robust``."""
    optimizer_on_rollback: Literal["reset", "restore"] = "reset"
    """``reset``: each stage begins with a fresh optimizer, schedule and order of examples (the
    paper's code). ``restore``: it goes on with those of the checkpoint that it begins from, and
    with its random number generators; a rollback point then holds the optimizer's state, too."""


@dataclass(frozen=True, kw_only=True)
class IesConfig:
    """Instance-dependent Early Stopping (``ies:``)."""

    delta: float = 0.01
    """Mean second difference of an example's loss below which it is mastered, in units of the mean
    token loss."""
    average: int = 3
    """Second differences that the mean is taken over."""


@dataclass(frozen=True, kw_only=True)
class DynamixConfig:
    """DynamixSFT (``dynamix:``); the defaults are its paper's."""

    gamma: float = 0.3
    """Share of examples that is drawn from all sub-datasets alike."""
    alpha: float = 0.95
    """Weight of the past in a sub-dataset's value."""
    beta: float = 4.0
    """How sharply sub-datasets of higher value are preferred."""
    every: int = 50
    """T: optimizer steps between two looks ahead."""
    examples: int | None = None
    """Of each sub-dataset for a look ahead; ``None``: ``train.micro_batch_size``."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    method: Literal["msft", "sft", "continual", "single_rollout", "ies", "dynamix"] = "msft"
    """How the mixture is trained on; see ``docs/ALGORITHMS.md``."""
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
    snapshot_dtype: Literal["bfloat16"] | None = None
    """Round float32 weights to this dtype in checkpoints, which halves them. Evaluations,
    roll-backs and the result are of the rounded ones. ``None``: checkpoints are exact."""
    max_disk: str | None = None
    """Limit for the store of the rollback points, temporary files included: bytes as in
    ``500MB`` or ``2GB``, or full checkpoints as in ``1.5x``. A run that needs more pauses.
    ``None``: no limit but the disk's."""
    log_every: int = 10
    """Optimizer steps between ``trained`` records in the journal."""
    log_with: tuple[str, ...] = ()
    """Trackers that get what the journal records, as in ``[tensorboard, wandb]``: those that
    Accelerate knows. One that writes files writes them to ``trackers/`` in the run directory."""
    log_project: str = "msft"
    """The project that a tracker files the run under."""
    model: ModelConfig
    lora: LoraConfig | None = None
    """An adapter; ``None``: all weights are trained."""
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    msft: MsftConfig = MsftConfig()
    ies: IesConfig = IesConfig()
    dynamix: DynamixConfig = DynamixConfig()

    @property
    def restores_optimizer(self) -> bool:
        """Return True if rollback points also hold the optimizer state."""
        return self.method == "msft" and self.msft.optimizer_on_rollback == "restore"
