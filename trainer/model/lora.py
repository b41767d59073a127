"""Train low-rank adapters (LoRA, arXiv 2106.09685) through PEFT, an optional dependency.

A linear layer ``W x`` becomes ``W x + scale · B A x`` with ``A`` of r rows and ``B`` of r columns;
only ``A`` and ``B`` are trained. ``B`` starts as zeros, so a fresh adapter changes nothing. ``A``
is random and follows from the run's seed alone, in every process and after every resume.

Example::

    loaded = load_for_training(config)          # with an adapter if ``lora`` is configured
    zero_adapter(loaded.model)                  # computes what the base does
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from trainer.config.schema import Config, LoraConfig
from trainer.errors import ConfigError
from trainer.model.load import LoadedModel, load_model
from trainer.model.weights import ADAPTER, Snapshots, drop_tied, in_adapter
from trainer.text import did_you_mean


def load_for_training(config: Config) -> LoadedModel:
    """Load the model that a run trains, with a fresh adapter if one is configured.

    Raises :class:`ConfigError` if there is no model, or if the adapter does not fit it.
    """
    loaded = load_model(config.model)
    if config.lora is not None:
        loaded = _add_adapter(loaded, config.lora, seed=config.seed, path=config.model.path)
    stored = Snapshots(loaded.model, config.snapshot_dtype).take()
    return replace(loaded, full_bytes=sum(t.nbytes for t in drop_tied(stored).values()))


def zero_adapter(model: torch.nn.Module) -> None:
    """Let the model compute what its base does: zero ``B``, restore modules trained as a whole."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if ".lora_B" in name or ".lora_embedding_B" in name:
                tensor.zero_()
            elif in_adapter(name) and ".lora_" not in name:
                tensor.copy_(state[name.replace(f"modules_to_save.{ADAPTER}", "original_module")])


def adapter_files(loaded: LoadedModel) -> dict[str, bytes]:
    """Return the configuration of an adapter as PEFT writes it; empty without an adapter."""
    if loaded.adapter is None:
        return {}
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in loaded.adapter.to_dict().items()
    }
    settings["inference_mode"] = True
    return {"adapter_config.json": f"{json.dumps(settings, indent=2, sort_keys=True)}\n".encode()}


def _add_adapter(loaded: LoadedModel, lora: LoraConfig, *, seed: int, path: str) -> LoadedModel:
    """Freeze the model and add a fresh adapter, in place."""
    peft = _import_peft()
    targets = _find_targets(loaded.model, lora)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=targets,
        modules_to_save=None if lora.modules_to_save is None else list(lora.modules_to_save),
    )
    # PEFT initialises layers one after the other on the CPU, so the result follows from the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = peft.inject_adapter_in_model(settings, loaded.model, adapter_name=ADAPTER)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"lora does not fit the model: {error}") from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, lora.dtype))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return replace(
        loaded,
        model=model,
        adapter=settings,
        parameters=loaded.parameters + sum(parameter.numel() for parameter in trained),
        trainable=sum(parameter.numel() for parameter in trained),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
    )


def _find_targets(model: Any, lora: LoraConfig) -> list[str]:
    """Return the module names for PEFT to match, each of which matches a layer of the model."""
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    known = sorted({name.rpartition(".")[2] for name in layers})
    for key in ("target_modules", "modules_to_save"):
        for target in getattr(lora, key) or ():
            if not any(_matches(name, target) for name, _ in model.named_modules()):
                raise ConfigError(
                    f"lora.{key}: the model has no module {target!r}{did_you_mean(target, known)} "
                    f"(its linear layers are {', '.join(known) or 'none'})"
                )
    targets = list(known if lora.target_modules is None else lora.target_modules)
    found = [m for n, m in layers.items() if any(_matches(n, target) for target in targets)]
    if not targets:
        raise ConfigError("lora: the model has no linear layer to adapt; set lora: null")
    widest = max(map(_rank, found), default=lora.r)
    if lora.r > widest:
        raise ConfigError(
            f"lora.r is {lora.r}, but no target layer has a rank above {widest}: lower it, or "
            "train all weights (lora: null)"
        )
    return targets


def _rank(layer: Any) -> int:
    """Return the largest rank of a layer's weight, which may be packed."""
    if isinstance(layer, Conv1D):
        return int(min(layer.weight.shape))
    return int(min(layer.in_features, layer.out_features))


def _matches(name: str, target: str) -> bool:
    """Return whether PEFT matches a module to a target name."""
    return name == target or name.endswith(f".{target}")


def _import_peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise ConfigError(
            "lora needs the package peft, which cannot be imported here: install it with "
            f"pip install 'msft-store[trainer,lora]' ({error})"
        ) from error
    return peft
