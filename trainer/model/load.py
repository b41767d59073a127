"""Loading a causal language model with its tokenizer.

A model comes from a directory or from the Hugging Face hub; the latter is downloaded to a directory
first, so that its safetensors files can serve as a store's base.

Example::

    loaded = load_model(ModelConfig(path="examples/stdlib_tasks/base"))
    loaded.model, loaded.tokenizer, loaded.parameters
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError
from trainer.model.weights import unique, weights_of

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model, its tokenizer and what is counted of it."""

    model: Any
    """A transformers ``PreTrainedModel``."""
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    """Where its files are."""
    parameters: int
    """N: all parameters, tied ones and those of an adapter once."""
    trainable: int
    """Of them, those that are trained."""
    layers: int
    """L."""
    hidden: int
    """d."""
    trained_bytes: int
    """Bytes of the run's weights in the dtype of training: parameters and saved buffers."""
    full_bytes: int
    """Bytes of one full checkpoint: the run's weights in the dtype of its checkpoints."""
    base_bytes: int
    """Bytes of the safetensors files in ``directory``."""
    adapter: Any = None
    """PEFT's configuration of the adapter; ``None`` where all parameters are trained."""

    @property
    def pad_token_id(self) -> int:
        """Return the token that fills batches; nothing depends on which one it is."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0


def load_model(config: ModelConfig) -> LoadedModel:
    """Load the model for training and its tokenizer.

    Raises :class:`ConfigError` where there is no model, no safetensors file in it, or where weights
    of the architecture are missing from the files.
    """
    directory = _locate(config.path)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
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
    except Exception as error:  # transformers raises what it likes on a file it cannot use
        raise ConfigError(
            f"model.path {directory} cannot be loaded: {_first_line(error)}"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"model.path {directory} lacks {len(info['missing_keys'])} of the architecture's "
            f"weights ({missing}, …), which would be random; is it a model of another kind?"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {directory} has no EOS token, so no completion could ever end"
        )
    text_config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in unique(weights_of(model)).values())
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
        base_bytes=sum(file.stat().st_size for file in files),
    )


def max_positions(model: Any) -> int | None:
    """Return the longest sequence that the model has positions for, where it says so."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _locate(path: str) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory.resolve()
    if directory.exists() or not _HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path {path} is no directory; name a directory with a model, or a hub id such "
            "as Qwen/Qwen2.5-0.5B"
        )
    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except Exception as error:  # no such model, no access, no network: each has its own class
        raise ConfigError(
            f"model.path {path} is no directory here, and it cannot be had from the Hugging Face "
            f"hub: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
