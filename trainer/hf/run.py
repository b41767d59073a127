"""Run MSFT, or a method that it is compared with, around the user's own Trainer.

A stage is one ``train()`` of a Trainer that ``make_trainer`` returns: the user's data preparation,
loss, optimizer, precision and devices, on the active sub-datasets. The run gives each stage a fresh
optimizer and schedule, evaluates through the Trainer, keeps rollback points in a store, and rolls
back in place, into the one model. Strategies, journal and report are those of ``msft-train``.

Invariants: a decision is journaled before it is acted on. A run that was killed begins its stage
again from the stage's root, and ends with the same weights and decisions, if training itself is
deterministic.

Example::

    def make_trainer(model, train_dataset, eval_dataset, callbacks, **overrides):
        return SFTTrainer(
            model=model, train_dataset=train_dataset, eval_dataset=eval_dataset,
            callbacks=callbacks, args=SFTConfig(**{**MY_ARGUMENTS, **overrides}),
        )

    run = MsftRun(make_trainer, model, {"maths": (train, validation)}, output_dir="run", base=PATH)
    result = run.train()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msft_store import Checkpoint
from msft_store.integrations.hf import find_local_model
from trainer.algorithms.base import Mode, Stage
from trainer.algorithms.overall import Overall
from trainer.config.load import build
from trainer.config.schema import (
    AverageConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MsftConfig,
    SubDatasetConfig,
)
from trainer.distributed import this_process
from trainer.errors import ConfigError, RunError
from trainer.hf.metrics import MetricReader, check_metrics
from trainer.hf.mixture import check_mixture
from trainer.hf.plan import LimitedOrder, PlacesSampler
from trainer.hf.session import RunSession, open_session
from trainer.hf.stage import StageCallback
from trainer.hf.weights import prepare_sharding
from trainer.journal import Record, effective, read, select
from trainer.report.report import write_report
from trainer.training.directory import JOURNAL
from trainer.training.replay import StageStart

METHODS = ("msft", "sft", "continual", "single_rollout")
"""The methods that need nothing of a Trainer but evaluations."""

_LACKS = {
    "dynamix": "takes back no trial steps",
    "online": "keeps the data set that its train() began with",
}

MakeTrainer = Callable[..., Any]
"""``make_trainer(model, train_dataset, eval_dataset, callbacks, **overrides)`` → a Trainer."""


@dataclass(frozen=True, kw_only=True)
class MsftResult:
    """A finished run.

    Attributes:
        checkpoint: The checkpoint of the result, whose weights the model has.
        decisions: The journal's records of all decisions, in order, each with its reason.
        report: The path of the report.
        model: The model with the result's weights, as the Trainer of the last stage had it.
    """

    checkpoint: Checkpoint
    decisions: list[Record]
    report: Path
    model: Any


class MsftRun:
    """A run of MSFT, or of a method that it is compared with, around any Trainer.

    Args:
        make_trainer: A function that returns a Trainer of transformers, of TRL or a class derived
            from it. It is called for each stage with ``model``, ``train_dataset``,
            ``eval_dataset`` and ``callbacks``, which the Trainer must get, and with training
            arguments of the stage, which must replace the user's own.
        model: The model to fine-tune. ``make_trainer`` may wrap it in an adapter.
        mixture: Sub-dataset → (training set, validation set), in the form that the Trainer takes.
        output_dir: The directory of the run: store, journal and report.
        base: The model that training starts from, as files: a directory, a safetensors file, or
            the hub's id of a model in the cache. ``None`` for an adapter.
        method: ``msft``, ``sft``, ``continual`` or ``single_rollout``.
        compute_budget: C, epochs of the active mixture in one stage.
        eval_every: Epochs of the active mixture between evaluations.
        metric: The metric that decides, by the name that the Trainer reports, without ``eval_``
            and the sub-dataset's name; or sub-dataset → metric.
        mode: The direction in which it improves, or sub-dataset → direction; ``None``: ``min``
            for ``loss``.
        seed: Seed of the order and of all random numbers of the stages.
        overall: The metric of the mixture. ``examples``: the mean over validation rows, the
            default; ``sub_datasets``: the mean over sub-datasets; ``relative``: the mean relative
            improvement over the base, the default for different metrics.
        **msft: Further settings of ``msft:``, as ``peak_window=4``.

    Raises:
        ConfigError: A setting or the mixture is not valid.
        BaseError: The base is not a model on this machine.
    """

    def __init__(
        self,
        make_trainer: MakeTrainer,
        model: Any,
        mixture: Mapping[str, tuple[Any, Any]],
        *,
        output_dir: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        method: str = "msft",
        compute_budget: float = 1.0,
        eval_every: float = 0.25,
        metric: str | Mapping[str, str] = "loss",
        mode: Mode | Mapping[str, Mode] | None = None,
        seed: int = 0,
        overall: Overall | None = None,
        **msft: Any,
    ) -> None:
        """Check the settings; nothing is written before :meth:`train`."""
        if method not in METHODS:
            lacks = _LACKS.get(method, "gives no losses of single examples")
            raise ConfigError(
                f"method {method!r} does not work around a Trainer, which {lacks}: choose one of "
                f"{', '.join(METHODS)}, or use msft-train"
            )
        self._make_trainer = make_trainer
        self._given = self.model = model
        self._mixture = check_mixture(mixture)
        self._directory = Path(output_dir).absolute()
        self._base_path = None if base is None else find_local_model(base)
        self._metrics = check_metrics(self._mixture.training_sets, metric, mode, overall)
        for key in ("cadence", "excluded_every"):
            if key in msft:
                raise ConfigError(
                    f"evaluation.{key}: a Trainer's stage is evaluated on all sub-datasets, every "
                    "eval_every epochs of the active mixture: remove it, or use msft-train"
                )
        settings = build(MsftConfig, {**msft, "compute_budget": compute_budget}, at="msft")
        if settings.optimizer_on_rollback != "reset":
            raise ConfigError("msft.optimizer_on_rollback: a Trainer's stage always begins afresh")
        if settings.exclusion == "soft":
            raise ConfigError("msft.exclusion: a Trainer's stage has its active sub-datasets alone")
        if settings.rollback_average > 1:
            raise ConfigError("msft.rollback_average: a Trainer's stage evaluates no averages")
        if settings.restart_warmup:
            raise ConfigError(
                "msft.restart_warmup: the schedule is the Trainer's; give it warm-up steps in "
                "make_trainer"
            )
        self._config = Config(
            method=method,  # type: ignore[arg-type]
            output_dir=str(self._directory),
            seed=seed,
            model=ModelConfig(path=str(base or getattr(model, "name_or_path", "") or "model")),
            data=DataConfig(
                sub_datasets={
                    name: SubDatasetConfig(train="") for name in self._mixture.training_sets
                }
            ),
            evaluation=EvalConfig(eval_every=eval_every),
            msft=settings,
            average=AverageConfig(kind="none"),
        )

    def train(self) -> MsftResult:
        """Train until the method stops; resume if the directory has a run.

        Returns:
            The result. The model has its weights.

        Raises:
            ConfigError: The Trainer does not fit a stage.
            RunError: The directory has another run, or another process uses it.
        """
        with open_session(self._config, self._base_path, self._metrics) as session:
            trainer = None
            while session.stop is None:
                trainer = self._train_stage(session)
            if trainer is None:
                # The Trainer may wrap the model in the adapter that gets the result's weights.
                self._make_stage(session, callbacks=[])
            checkpoint = session.finish(session.stop)
        if this_process().is_main_process:
            write_report(self._directory)
        this_process().wait_for_everyone()
        counted = effective(read(self._directory / JOURNAL))
        return MsftResult(
            checkpoint=checkpoint,
            decisions=select(counted, "decided"),
            report=self._directory / "report.md",
            model=self.model,
        )

    def _train_stage(self, session: RunSession) -> Any:
        """Train the current stage, and return its Trainer."""
        seed = self._seed_of(session.start.stage)
        stage = session.start.stage
        sizes = {name: self._mixture.train_sizes[name] for name in stage.active}
        order = LimitedOrder.of(stage, sizes, seed=self._config.seed) if stage.limits else None
        callback = StageCallback(
            session,
            MetricReader(keys=self._metrics.names),
            eval_every=self._config.evaluation.eval_every,
            seed=seed,
            order=order,
        )
        trainer = self._make_stage(session, callbacks=[callback])
        if order is not None:
            _set_order(trainer, order, rows=sum(sizes.values()))
        callback.attach(trainer)
        prepare_sharding(trainer)
        session.restore_root()
        trainer.train()
        # Accelerate wraps the forward method for mixed precision, once for every stage.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        trainer.accelerator.free_memory()
        if callback.decision is None:
            raise RunError("make_trainer must give the callbacks that it gets to the Trainer")
        session.end_stage(callback.decision)
        return trainer

    def _make_stage(self, session: RunSession, callbacks: list[Any]) -> Any:
        """Make the Trainer of the current stage, on the one model."""
        trainer = self._make_trainer(
            model=_remove_adapter(self._given, self.model),
            train_dataset=self._mixture.training_set(session.start.stage.active),
            eval_dataset=dict(self._mixture.validation_sets),
            callbacks=callbacks,
            **self._overrides(session.start),
        )
        if _find_base(trainer.model) is not _find_base(self._given):
            raise ConfigError(
                "make_trainer trains another model than the one that it gets: return a Trainer of "
                "this model, which may be wrapped in an adapter"
            )
        self.model = trainer.model
        session.attach(trainer, self._mixture)
        return trainer

    def _seed_of(self, stage: Stage) -> int:
        words = np.random.SeedSequence([self._config.seed, stage.number]).generate_state(1)
        return int(words[0])

    def _overrides(self, start: StageStart) -> dict[str, Any]:
        """Return the training arguments that make a ``train()`` a stage."""
        return {
            "output_dir": str(self._directory / "trainer"),
            "num_train_epochs": 1.0 if start.stage.limits else start.stage.epochs,
            "max_steps": -1,
            "eval_on_start": start.root is None,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "seed": self._seed_of(start.stage),
            "data_seed": None,
        }


def _set_order(trainer: Any, order: LimitedOrder, *, rows: int) -> None:
    """Let a Trainer take its rows in an order, if it has the ``rows`` that the order is of."""
    if len(trainer.train_dataset) != rows:
        raise ConfigError(
            f"single_rollout leaves sub-datasets out within a stage, but the Trainer made "
            f"{len(trainer.train_dataset)} rows of {rows}: turn packing off, or use another method"
        )
    trainer._get_train_sampler = lambda *_: PlacesSampler(order)


def _find_base(model: Any) -> Any:
    """Return the model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _remove_adapter(given: Any, model: Any) -> Any:
    """Return the model that was given, without the adapter that a Trainer has put around it.

    ``make_trainer`` makes the adapter again for every stage, and a roll-back restores its weights.
    """
    if model is given:
        return given
    if hasattr(model, "unload"):
        model.unload()
    if hasattr(given, "peft_config"):
        del given.peft_config
    return given
