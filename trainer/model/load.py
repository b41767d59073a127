"""Load a causal language model with its tokenizer.

A model of the Hugging Face hub is downloaded to a directory first, so that a store can use its
safetensors files as a base.

Example::

    loaded = load_model(ModelConfig(path="examples/stdlib_tasks/base"))
    loaded.model, loaded.tokenizer, loaded.parameters
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trainer.config.checks import HUB_ID
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError, first_line
from trainer.model.weights import drop_tied, weights_of

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model, its tokenizer and its sizes."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    parameters: int
    """N: the number of all parameters, with an adapter's; tied ones count once."""
    trainable: int
    layers: int
    """L: the number of layers."""
    hidden: int
    """d: the width of the residual stream."""
    trained_bytes: int
    """Bytes of the run's weights, parameters and saved buffers, in the dtype of training."""
    full_bytes: int
    """Bytes of a full checkpoint: the same weights in the dtype of checkpoints."""
    adapter: Any = None
    """PEFT's configuration of the adapter; ``None`` if all parameters are trained."""

    @property
    def pad_token_id(self) -> int:
        """The id of the padding token; no result depends on it."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)


def load_model(config: ModelConfig) -> LoadedModel:
    """Load the model for training and its tokenizer.

    Raises :class:`ConfigError` if there is no model or no safetensors file, if the files lack
    weights of the architecture, or if the tokenizer has no EOS token.
    """
    directory = _locate(config.path)
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"model.path {directory} has no .safetensors file; convert the model once, for example "
            "with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            directory,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            output_loading_info=True,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many classes for unusable files
        raise ConfigError(
            f"model.path {directory} cannot be loaded: {first_line(error)}"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"model.path {directory} lacks {len(info['missing_keys'])} of the architecture's "
            f"weights ({missing}, …), which would be random: name a causal language model"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {directory} has no EOS token, so no completion could end: set "
            "eos_token in its configuration"
        )
    text_config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in drop_tied(weights_of(model)).values())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        directory=directory,
        parameters=parameters,
        trainable=parameters,
        layers=int(text_config.num_hidden_layers),
        hidden=int(text_config.hidden_size),
        trained_bytes=weight_bytes,
        full_bytes=weight_bytes,
    )


def max_positions(model: Any) -> int | None:
    """Return the number of the model's positions, or ``None`` if its configuration has none."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _locate(path: str) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory.resolve()
    if directory.exists() or not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path {path} is not a directory: name a directory with a model, or a hub id "
            "such as Qwen/Qwen2.5-0.5B"
        )
    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except Exception as error:  # a missing model and no network raise different classes
        raise ConfigError(
            f"model.path {path} is not a directory, and it cannot be downloaded from the Hugging "
            f"Face hub: {first_line(error)}"
        ) from error
