"""Check that a store can serve a Trainer's settings, and read the metrics of its evaluations.

Example::

    check_trainer(args, state, model, attached=False, resumable=True)
    extract_metrics({"eval_one_loss": 0.4, "eval_one_runtime": 1.2})    # {"eval_one_loss": 0.4}
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from msft_store.errors import InvalidInputError
from msft_store.integrations.trained import describe_outside, outside_parameters
from msft_store.retention import suggest_metric

_COUNTERS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "tokens_per_second",
    "model_preparation_time",
    "jit_compilation_time",
    "num_tokens",
)
"""The Trainer's and TRL's own counters of an evaluation. With them, no two checkpoints would be
equal.
"""
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def check_trainer(
    args: TrainingArguments,
    state: TrainerState,
    model: torch.nn.Module,
    *,
    attached: bool,
    resumable: bool,
) -> None:
    """Raise an error for settings that cannot work, and warn of callbacks that would lose their
    state.
    """
    if args.save_strategy == "best":
        raise InvalidInputError(
            'save_strategy="best" decides after the callback has run: use "steps" or "epoch", '
            "and best={metric: direction} of StoreCallback"
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise InvalidInputError(
            "enable_jit_checkpoint writes checkpoint-* directories without asking callbacks: "
            "remove it"
        )
    if args.fp16 and not attached:
        raise InvalidInputError("fp16 has a gradient scaler: use callback.attach(trainer)")
    kind = AcceleratorState().distributed_type.value
    if kind in _SHARDED or any(hasattr(tensor, "placements") for tensor in model.parameters()):
        raise InvalidInputError(
            f"the model or its optimizer is sharded ({kind}): use msft_store.integrations.dcp, "
            "in which every process saves what it holds"
        )
    known: Any = state.stateful_callbacks or {}
    others = ", ".join(sorted(set(known) - {"TrainerControl"}))
    if others and resumable and not attached:
        warnings.warn(
            f"{others} would lose its state in a resume: use callback.attach(trainer)", stacklevel=1
        )


def find_outside(
    optimizer: Any, model: torch.nn.Module, *, resumable: bool
) -> dict[str, torch.Tensor]:
    """Return the parameters that an optimizer trains and that are not the model's.

    Warn that only a resume point holds them. Raise an error if there will be none.
    """
    found = outside_parameters([optimizer], [model])
    if found and not resumable:
        raise InvalidInputError(
            f"{describe_outside(found)}, would be in no checkpoint: make it a part of the model, "
            "or keep a resume point (resumable=True, save_only_model=False)"
        )
    if found:
        warnings.warn(
            f"{describe_outside(found)}, is kept in the resume point alone: StoreCallback.restore "
            "and load_best_model_at_end do not restore it",
            stacklevel=1,
        )
    return found


def find_trainer(callback: TrainerCallback) -> Trainer | None:
    """Return the Trainer that is calling this callback now; ``None`` if another loop calls it.

    The Trainer gives its callbacks no reference to itself, so this looks for it among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None


def find_ignored_options(args: TrainingArguments) -> list[str]:
    """Return a warning for each option that has no effect with a store."""
    found = []
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy != HubStrategy.END:
        found.append(
            f"push_to_hub with hub_strategy={strategy.value!r} pushes nothing while training, "
            "because there are no checkpoint directories: call trainer.push_to_hub() after it"
        )
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer.endswith("_layerwise") and not args.save_only_model:
        found.append(
            f"optim={optimizer!r} hides its state from the Trainer, so that a resume begins with a "
            "new one and is not exact: use it without layerwise"
        )
    if args.save_on_each_node:
        found.append("save_on_each_node has no effect: only the main process writes to the store")
    if not getattr(args, "save_safetensors", True):
        found.append("save_safetensors=False has no effect: the store pickles nothing")
    return found


def extract_metrics(
    evaluation: Mapping[str, Any], wanted: Collection[str] = ()
) -> dict[str, float]:
    """Return the metrics of one evaluation, without the Trainer's counters that are not wanted.

    Several evaluation sets arrive one by one, as ``eval_NAME_loss``. A metric that has the same
    name in all of them, ``eval_entropy``, is added as ``eval_NAME_entropy``.
    """
    # A metric may be called eval_NAME_..._runtime; the Trainer's own time has the shortest name.
    times = [name for name in evaluation if name.endswith("_runtime")]
    prefix = min(times, key=len).removesuffix("runtime") if times else "eval_"
    counters = {f"{start}{counter}" for start in (prefix, "eval_") for counter in _COUNTERS}
    found = {
        name: float(value)
        for name, value in evaluation.items()
        if isinstance(value, Real) and (name in wanted or name not in {*counters, "epoch"})
    }
    if not prefix.startswith("eval_"):
        return found
    alike = {name: value for name, value in found.items() if not name.startswith(prefix)}
    return found | {prefix + name.removeprefix("eval_"): alike[name] for name in alike}


def find_unknown_metrics(names: Iterable[str], metrics: Mapping[str, float]) -> list[str]:
    """Return a warning for each metric whose best is to be kept but which no evaluation gives."""
    return [
        f"no evaluation gives {name!r}, so its best checkpoint is not kept; "
        f"{suggest_metric(name, set(metrics))}"
        for name in dict.fromkeys(names)
        if name not in metrics
    ]
