"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT, which is an optional dependency.

A linear layer ``W x`` becomes ``W x + scale · B A x`` with ``A`` of r rows and ``B`` of r columns;
only ``A`` and ``B`` are trained. ``B`` begins with zeros, so a fresh adapter changes nothing; ``A``
is random and follows from the run's seed alone, in every process and after every resume.

Example::

    loaded = load_trained(config)               # with an adapter where ``lora`` is configured
    silence(loaded.model)                       # computes what the base does
    write_adapter(loaded, weights, directory)   # for PeftModel.from_pretrained
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from trainer.config.schema import Config, LoraConfig
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.model.load import LoadedModel, load_model
from trainer.model.weights import ADAPTER, Snapshots, unique, weights_of

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_trained(config: Config) -> LoadedModel:
    """Load the model that a run trains, as it is before any training.

    Raises :class:`ConfigError` where there is none, or where an adapter does not fit it.
    """
    loaded = load_model(config.model)
    if config.lora is not None:
        loaded = _adapted(loaded, config.lora, seed=config.seed, path=config.model.path)
    stored = Snapshots(loaded.model, config.snapshot_dtype).take()
    return replace(loaded, full_bytes=sum(t.nbytes for t in unique(stored).values()))


def silence(model: torch.nn.Module) -> None:
    """Set the adapter to one that changes nothing."""
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            if ".lora_B" in name or ".lora_embedding_B" in name:
                tensor.zero_()


def write_adapter(
    loaded: LoadedModel, weights: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """Write an adapter as PEFT does: its weights, and a configuration that names the base."""
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in loaded.adapter.to_dict().items()
    }
    settings["inference_mode"] = True
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(settings, indent=2, sort_keys=True)
    write_atomic(directory / _CONFIG, f"{text}\n".encode())


def _adapted(loaded: LoadedModel, lora: LoraConfig, *, seed: int, path: str) -> LoadedModel:
    """Freeze the model and give it a fresh adapter, in place."""
    peft = _peft()
    targets = _targets(loaded.model, lora)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=targets,
    )
    # Layers are made one after the other on the CPU, so the seed alone decides.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = peft.inject_adapter_in_model(settings, loaded.model, adapter_name=ADAPTER)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"lora does not fit the model: {error}") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(getattr(torch, lora.dtype))
    return replace(
        loaded,
        model=model,
        adapter=settings,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        trained_bytes=sum(parameter.nbytes for parameter in trained),
    )


def _targets(model: Any, lora: LoraConfig) -> list[str]:
    """Return the names that PEFT shall look for, each of which stands for a layer that is there."""
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    known = sorted({name.rpartition(".")[2] for name in layers})
    for target in lora.target_modules or ():
        if not any(_is_named(name, target) for name, _ in model.named_modules()):
            near = difflib.get_close_matches(target, known, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"lora.target_modules: the model has no module {target!r}{advice} "
                f"(its linear layers are {', '.join(known) or 'none'})"
            )
    targets = list(known if lora.target_modules is None else lora.target_modules)
    found = [m for n, m in layers.items() if any(_is_named(n, target) for target in targets)]
    if not targets:
        raise ConfigError("lora: the model has no linear layer that an adapter could be for")
    widest = max((min(module.weight.shape) for module in found), default=lora.r)
    if lora.r > widest:
        raise ConfigError(
            f"lora.r is {lora.r}, but no layer that it is for has a rank above {widest}: lower it, "
            "or train all weights (lora: null)"
        )
    return targets


def _is_named(name: str, target: str) -> bool:
    """Say whether PEFT takes a module for one that is asked for."""
    return name == target or name.endswith(f".{target}")


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise ConfigError(
            "lora needs the package peft, which cannot be imported here: install it with "
            f"pip install 'msft-store[trainer,lora]' ({error})"
        ) from error
    return peft
