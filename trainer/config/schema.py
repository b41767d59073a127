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
    """The model to fine-tune (``model:``).

    Attributes:
        path: A directory, or an id on the hub, that ``AutoModelForCausalLM`` loads.
        dtype: Dtype of the weights in training; the default is the MSFT paper's. float16 is
            refused, because its gradients would have to be scaled.
        gradient_checkpointing: Recompute activations in the backward pass. This takes less memory
            and about a third more compute.
        attn_implementation: Passed to transformers; ``None`` leaves the choice to it.
        revision: Branch, tag or commit of a model on the hub; ``None``: the newest.
        trust_remote_code: Run the Python code that comes with the model, with all that you may do.
        quantization: Hold the frozen weights of linear layers in fewer bits, for ``lora`` only.
            ``nf4``: 4 bits by bitsandbytes, as in QLoRA; ``int8``: 8 bits by torchao. ``None``: in
            ``dtype``, which is the dtype of the computation otherwise.
    """

    path: str
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["nf4", "int8"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (``lora:``), trained instead of the model's weights.

    Attributes:
        r: Rank of the update of each layer.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout probability of the adapter's input in training.
        target_modules: Names of the layers that get an adapter, as in ``[q_proj, v_proj]``;
            ``None``: all linear layers except the output layer.
        modules_to_save: Names of modules that are trained as a whole besides, as in ``[lm_head]``,
            in the model's dtype; checkpoints and the result hold them.
        rslora: Scale by alpha / √r instead.
        dtype: Dtype of the adapter in training; the model's is ``model.dtype``.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    rslora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of rows that needs more than the path of a file.

    Attributes:
        file: A JSON Lines or Parquet file, or with ``category`` a mixture file.
        category: The rows of a mixture file to use (see ``data.mixture``).
        part: The list to use of a mixture file that holds several; ``None``: the list with the name
            of the split.
        hub: Instead of ``file``: a data set that the ``datasets`` package loads, by its id on the
            hub or from a directory.
        config: The configuration (subset) of that data set.
        split: The split of that data set, or a slice of one such as ``train[:90%]``.
        revision: The revision of that data set on the hub; ``None``: the newest.
    """

    file: str | None = None
    category: str | None = None
    part: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class FieldsConfig:
    """Templates that make examples of a row's columns; see :mod:`trainer.config.templates`.

    Attributes:
        prompt: The text to condition on, as in ``"Q: {question}\\nA:"``; needs ``completion``.
        completion: The text to train on, as in ``" {answer}"``.
        text: Instead of the two: text of which all tokens are trained on.
        messages: Instead of templates: the name of the column that holds a conversation, such as
            ``conversations`` in ShareGPT. A column ``tools`` describes its tools.
    """

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: str | None = None


@dataclass(frozen=True, kw_only=True)
class SubDatasetConfig:
    """One sub-dataset: JSON Lines or Parquet (``.parquet``) files, or other sources.

    Attributes:
        train: Training examples.
        validation: Examples on which peaks are found; ``None``: the share
            ``data.validation_share`` of the training examples.
        test: Examples that are evaluated once, at the end.
        fields: Templates for the rows; ``None``: rows have ``prompt`` and ``completion``,
            ``messages``, or ``text``.
        metric: The metric of the sub-dataset, as in ``evaluation.metric``; ``None``: that one, or
            ``loss`` where ``exact_match`` finds no references, in rows of ``text``.
    """

    train: str | SourceConfig
    validation: str | SourceConfig | None = None
    test: str | SourceConfig | None = None
    fields: FieldsConfig | None = None
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture in one JSON file per split, or in one file (:mod:`trainer.config.mixture_file`).

    Attributes:
        train: Training examples; the categories in it are the sub-datasets.
        validation: Examples on which peaks are found; ``None``: the share
            ``data.validation_share`` of the training examples.
        test: Examples that are evaluated once, at the end.
    """

    train: str | SourceConfig
    validation: str | SourceConfig | None = None
    test: str | SourceConfig | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture (``data:``).

    Attributes:
        sub_datasets: Name → sources.
        directory: Instead of ``sub_datasets``: a directory in which every ``NAME.train.jsonl``
            with its ``NAME.validation.jsonl`` and optional ``NAME.test.jsonl`` is a sub-dataset.
            Loading replaces it by ``sub_datasets``.
        mixture: Instead of ``sub_datasets``: mixture files. Loading replaces them, too.
        loss_on: Turns of the assistant in a conversation that have a loss, in training and in
            evaluation: the ``last`` one, or ``all``. Exact match always asks for the last one.
        max_length: Tokens that an example may have. The default is the MSFT paper's.
        over_length: A longer example is dropped, or cut to its first ``max_length`` tokens and
            dropped only if none of these has a loss. Both are counted and reported.
        max_examples: Training examples to use of each sub-dataset, chosen at random; ``None``: all.
        validation_share: Share of the training examples to set aside, at random, as validation
            data for a sub-dataset without any. With ``max_examples``: the share of these, in
            addition to them.
        seed: Seed of both random choices. It is not the run's seed, so that runs with different
            seeds have the same examples.
        sampling: Amount of each sub-dataset in an epoch. ``proportional``: every example once;
            ``equal``: the same number of examples of each; ``temperature``: a number proportional
            to its size to the power of 1 / ``temperature``. The epoch's length is the same.
        temperature: Temperature for ``sampling: temperature``. 1 is ``proportional``; a high value
            is nearly ``equal``.
    """

    sub_datasets: Mapping[str, SubDatasetConfig] = field(default_factory=dict)
    directory: str | None = None
    mixture: MixtureConfig | None = None
    loss_on: Literal["last", "all"] = "last"
    max_length: int = 512
    over_length: Literal["drop", "truncate"] = "drop"
    max_examples: int | None = None
    validation_share: float | None = None
    seed: int = 0
    sampling: Literal["proportional", "equal", "temperature"] = "proportional"
    temperature: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization (``train:``).

    The defaults of ``optimizer``, ``lr``, ``weight_decay``, ``schedule``, ``warmup_ratio`` and
    ``batch_size`` are the MSFT paper's; those of ``betas`` and ``eps`` are torch's.

    Attributes:
        compute_dtype: Dtype of the computation with float32 weights, by autocast. This is faster
            if the device supports it, and small updates of the weights are not lost. ``None``: the
            dtype of the weights.
        optimizer: Adam or AdamW, with moments in the dtype of the weights; or one of these with
            moments of 8 or 4 bits by torchao, which compiles its step for each shape of weights.
        stochastic_rounding: Round bf16 weights up or down at random after each step, so that small
            updates are not lost on average. More weights change, and rollback points take more.
        lr: Peak learning rate.
        betas: Decay of the running means of gradient and squared gradient.
        eps: Added to the denominator of an update.
        weight_decay: Weight decay of matrices only. Adam adds it to the gradient, AdamW subtracts
            it from the weights.
        schedule: Learning rate over a stage, after the warm-up.
        warmup_ratio: Share of a stage's steps in which the learning rate rises from 0.
        batch_size: Examples per optimizer step, over all processes.
        micro_batch_size: Examples per forward pass and process.
        loss_average: The loss of an optimizer step is the mean over the ``tokens`` with a loss in
            its batch, the mean over its ``examples`` of their means, or over its ``micro_batches``
            (the MSFT paper's code); the latter depends on ``micro_batch_size``.
        max_grad_norm: Gradient norm above which gradients are scaled down; ``None``: no clipping.
        on_divergence: Reaction to a loss or gradient norm that is not finite. ``stop``: the run
            ends with the best overall so far. ``rollback``: the weights of the last evaluation are
            restored and the batches since then are skipped, which needs one more rollback point.
        max_skips: Number of such roll-backs after which a run stops.
    """

    compute_dtype: Literal["bfloat16"] | None = None
    optimizer: Literal["adam", "adamw", "adam8bit", "adamw8bit", "adam4bit", "adamw4bit"] = "adam"
    stochastic_rounding: bool = False
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = 0.0
    batch_size: int = 64
    micro_batch_size: int = 16
    loss_average: Literal["tokens", "examples", "micro_batches"] = "tokens"
    max_grad_norm: float | None = None
    on_divergence: Literal["stop", "rollback"] = "stop"
    max_skips: int = 3


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation (``evaluation:``).

    Attributes:
        metric: The metric of every sub-dataset that names none. ``exact_match``: share of greedy
            generations with the right answer (``max``); ``loss``: mean token loss of the
            completion (``min``); ``token_accuracy``: share of the completion's tokens that are the
            most probable ones, each after the true ones before it (``max``);
            ``module:function``: your own, see :mod:`trainer.model.metrics`.
        eval_every: Distance of two evaluations in the unit of ``cadence``; the default is the MSFT
            paper's.
        cadence: Unit of ``eval_every``. ``active``: epochs of the active mixture (the paper's), so
            that a stage has more evaluations per step the fewer sub-datasets it trains on;
            ``mixture``: epochs of the whole mixture; ``steps``: optimizer steps, a whole number.
            Evaluations begin anew with each stage, and its end has one with any cadence.
        excluded_every: One of so many evaluations of a stage also measures the sub-datasets that
            are not active, and so do its first and its last one. The others carry the last known
            values forward and cannot be the best overall. 1: every evaluation measures all.
        answer_pattern: Regular expression whose first group is the answer, in generations and in
            references; ``None``: the whole completion, stripped.
        answer_match: The match of ``answer_pattern`` that counts.
        answer: Answers are compared as texts, as numbers (the first of each, so that ``1,200.0``
            is ``1200``), or as texts without regard to case.
        max_new_tokens: Tokens after which a generation ends.
        batch_size: Examples per forward pass in evaluation.
        max_examples: Validation examples to use of each sub-dataset, the first ones; ``None``: all.
        predictions: Examples of each sub-dataset whose generations are written to
            ``predictions/`` in the run's directory at each evaluation, the wrong ones first;
            0: none.
        overall: The metric of the mixture. ``examples``: mean over examples (the MSFT paper's
            code); ``sub_datasets``: mean over sub-datasets; ``relative``: mean relative change
            against the base, each in its metric's direction (``max``). If sub-datasets have
            different metrics, the two means are those of ``evaluation.metric`` alone. ``None``:
            ``examples`` for one metric, else ``relative``.
    """

    metric: str = "exact_match"
    eval_every: float = 0.25
    cadence: Literal["active", "mixture", "steps"] = "active"
    excluded_every: int = 1
    answer_pattern: str | None = None
    answer_match: Literal["first", "last"] = "last"
    answer: Literal["text", "number", "folded"] = "text"
    max_new_tokens: int = 64
    batch_size: int = 64
    max_examples: int | None = None
    predictions: int = 100
    overall: Literal["examples", "sub_datasets", "relative"] | None = None


@dataclass(frozen=True, kw_only=True)
class MsftConfig:
    """The MSFT algorithm (``msft:``), of which ``online`` uses most keys, too.

    The other methods use ``compute_budget`` only, and ``single_rollout`` the exclusion, too.

    Attributes:
        compute_budget: C, epochs of the active mixture in one roll-out; with ``continual``, epochs
            of each sub-dataset.
        peak_window: W, evaluations without a better value after which the earliest champion ends
            the roll-out; ``None``: no such rule, as in the paper.
        max_stages: Stages at most; ``None``: twice the number of sub-datasets.
        overall_window: Evaluations of a stage after which it ends if none of them has a better
            overall metric than its root; ``None``: no such rule, as in the paper.
        root_peaks: ``true``: a sub-dataset may peak at the root of a later stage (the paper).
            ``false``: it has not peaked there, because a restart makes things worse at first.
        drop_count: Most sub-datasets that one stage excludes of those that peak first at the same
            evaluation (the paper's code). The paper excludes one.
        drop_passed: Most sub-datasets that one stage excludes of those whose peaks have passed.
        exclusion: ``hard``: an excluded sub-dataset is no longer trained on (the paper). ``soft``:
            each epoch has the share ``floor`` of its examples, against forgetting. The same holds
            for ``single_rollout`` after a sub-dataset's peak (Soft SRO). ``None``: ``soft`` with
            ``online``, else ``hard``.
        floor: Share of an excluded sub-dataset's examples in an epoch, with ``exclusion: soft``.
        return_margin: Standard errors by which an excluded sub-dataset must be worse than at its
            peak to be included again; ``None``: never, as in the paper.
        rollback_average: Evaluations around a peak whose average a stage begins from, if its
            overall metric is no worse than the peak's; 1: the checkpoint of the peak, as in the
            paper.
        rollback_margin: With ``online``: standard errors of the overall metric by which the
            checkpoint of a peak must be better than the current one for a roll-back; ``None``: no
            roll-backs.
        restart_warmup: Epochs in which the learning rate rises from 0 in stages after the first; 0
            in the paper.
        peaks: ``first_best``: the first best value is the peak, and it has passed if another
            evaluation follows (the paper). ``robust``: the next three keys apply.
        smoothing: Evaluations whose mean replaces a value, with ``peaks: robust``; 1: none.
        margin: Standard errors by which a metric must beat the best one so far, with
            ``peaks: robust``.
        patience: Evaluations without an improvement after which a peak has passed, with
            ``peaks: robust``.
        optimizer_on_rollback: ``reset``: each stage begins with a fresh optimizer, schedule and
            order of examples (the paper's code). ``restore``: a stage continues with those of the
            checkpoint that it begins from, and with its random number generators. A rollback point
            then also holds the optimizer's state.
    """

    compute_budget: float = 3.0
    peak_window: int | None = None
    max_stages: int | None = None
    overall_window: int | None = None
    root_peaks: bool = True
    drop_count: int = 1
    drop_passed: int = 1
    exclusion: Literal["hard", "soft"] | None = None
    floor: float = 0.1
    return_margin: float | None = None
    rollback_average: int = 1
    rollback_margin: float | None = None
    restart_warmup: float = 0.0
    peaks: Literal["first_best", "robust"] = "first_best"
    smoothing: int = 1
    margin: float = 0.5
    patience: int = 2
    optimizer_on_rollback: Literal["reset", "restore"] = "reset"


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """The average of checkpoints as the result of a run (``average:``), for every method.

    An average is evaluated on validation data, and is the result only if it is better there than
    the best checkpoint. See :mod:`trainer.algorithms.averages`.

    Attributes:
        kind: ``none``; ``last``: the last evaluations of the run; ``best``: those around the best
            overall; ``decay``: the last ones, weighted as a decay of the learning rate;
            ``champions``: the best checkpoint of every sub-dataset; ``greedy``: the best overall
            ones, of which each stays if the average is better with it.
        count: Checkpoints of an average, except with ``champions``.
    """

    kind: Literal["none", "last", "best", "decay", "champions", "greedy"] = "best"
    count: int = 4


@dataclass(frozen=True, kw_only=True)
class IesConfig:
    """Instance-dependent Early Stopping (``ies:``).

    Attributes:
        delta: Mean second difference of an example's loss below which it is mastered, in units of
            the mean token loss.
        average: Second differences that the mean is taken over.
    """

    delta: float = 0.01
    average: int = 3


@dataclass(frozen=True, kw_only=True)
class DynamixConfig:
    """DynamixSFT (``dynamix:``); the defaults are its paper's (arXiv 2508.12116).

    Attributes:
        gamma: Share of the examples that is drawn equally from all sub-datasets.
        alpha: Weight of the past in a sub-dataset's value.
        beta: Inverse temperature of the preference for sub-datasets of higher value.
        every: T, optimizer steps between two probes.
        examples: Examples of each sub-dataset in a probe; ``None``: ``train.micro_batch_size``.
    """

    gamma: float = 0.3
    alpha: float = 0.95
    beta: float = 4.0
    every: int = 50
    examples: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run.

    Attributes:
        method: The training method; see ``docs/ALGORITHMS.md``.
        output_dir: The directory of the run: store, journal, report, result.
        seed: Seed of the order of examples and of all random number generators.
        threads: CPU threads for torch; ``None``: torch's default.
        resume_every: Optimizer steps between resume points; ``None``: none, so a killed run repeats
            its stage.
        async_save: Commit checkpoints in the background while training continues, which takes host
            memory for one copy of the weights; ``false``: wait for each commit. The results are the
            same.
        resident_reference: Keep a copy of the weights of the stage's root on their device, and find
            there, not on the CPU, what a checkpoint changed. For GPUs; the results are the same.
        snapshot_dtype: Round float32 weights to this dtype in checkpoints, which halves their size.
            Evaluations, roll-backs and the result have the rounded weights. ``None``: checkpoints
            are exact.
        max_disk: Limit of the store of the rollback points, temporary files included: bytes as in
            ``500MB`` or ``2GB``, or full checkpoints as in ``1.5x``. A run pauses if it needs more.
            ``None``: no limit.
        log_every: Optimizer steps between ``trained`` records in the journal.
        log_with: Trackers that get the numbers of the journal, as in ``[tensorboard, wandb]``; all
            that Accelerate supports. A tracker that writes files writes them to ``trackers/`` in
            the run directory.
        log_project: The name of the project in the trackers.
        model: The model to fine-tune.
        lora: A low-rank adapter; ``None``: all weights are trained.
        data: The mixture.
        train: Optimization.
        evaluation: Evaluation.
        msft: Settings of MSFT, and the compute budget of all methods.
        average: The average of checkpoints as the result, for every method.
        ies: Settings of IES.
        dynamix: Settings of DynamixSFT.
    """

    method: Literal["msft", "online", "sft", "continual", "single_rollout", "ies", "dynamix"] = (
        "online"
    )
    output_dir: str
    seed: int = 0
    threads: int | None = None
    resume_every: int | None = None
    async_save: bool = True
    resident_reference: bool = False
    snapshot_dtype: Literal["bfloat16"] | None = None
    max_disk: str | None = None
    log_every: int = 10
    log_with: tuple[str, ...] = ()
    log_project: str = "msft"
    model: ModelConfig
    lora: LoraConfig | None = None
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    msft: MsftConfig = MsftConfig()
    average: AverageConfig = AverageConfig()
    ies: IesConfig = IesConfig()
    dynamix: DynamixConfig = DynamixConfig()

    @property
    def exclusion(self) -> Literal["hard", "soft"]:
        """Return ``msft.exclusion``, or the method's own where it is not set."""
        return self.msft.exclusion or ("soft" if self.method == "online" else "hard")

    @property
    def restores_optimizer(self) -> bool:
        """Return True if rollback points also hold the optimizer state."""
        return self.method == "msft" and self.msft.optimizer_on_rollback == "restore"
