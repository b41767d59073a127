"""The configuration of a run: small frozen dataclasses, read from one YAML file.

Relative paths are taken from the folder of the YAML file, ``output_dir`` from the working
directory. An unknown key is an error that names the nearest valid one.

Example::

    config = load_config("examples/stdlib_tasks/demo.yaml", overrides=["train.lr=1e-5", "seed=1"])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


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

    sub_datasets: Mapping[str, SubDatasetConfig]
    """Name → files."""
    max_length: int = 512
    """Tokens; a longer example is dropped, counted and reported."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization (``train:``)."""

    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    method: Literal["msft", "sft"] = "msft"
    output_dir: str
    """The run directory: store, journal, report, result."""
    seed: int = 0
    threads: int | None = None
    """CPU threads for torch; ``None`` leaves torch's default."""
    resume_every: int | None = None
    """Optimizer steps between resume points; ``None``: none, a killed run repeats its stage."""
    log_every: int = 10
    """Optimizer steps between ``trained`` records in the journal."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    msft: MsftConfig = MsftConfig()
