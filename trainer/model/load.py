"""Load a causal language model with its tokenizer.

A model of the Hugging Face hub is downloaded to a directory first, so that a store can use its
safetensors files as a base.

Example::

    loaded = load_model(ModelConfig(path="examples/stdlib_tasks/base"))
    loaded.model, loaded.tokenizer, loaded.parameters
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from trainer.config.checks import HUB_ID
from trainer.config.schema import ModelConfig
from trainer.errors import ConfigError, first_line
from trainer.model.weights import drop_tied, weights_of

_log = logging.getLogger(__name__)
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
    directory = _locate(config)
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.trust_remote_code:
        _log.warning("model.trust_remote_code is on: Python code in %s may run", directory)
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"model.path {directory} has no .safetensors file; convert the model once, for example "
            "with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        _check_architecture(AutoConfig.from_pretrained(directory, **options), directory)
        model, info = load(
            directory,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            quantization_config=_quantization(config),
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many classes for unusable files
        advice = ""
        if "trust_remote_code" in str(error):
            advice = "; read that code, and set model.trust_remote_code: true if you trust it"
        raise ConfigError(
            f"model.path {directory} cannot be loaded: {first_line(error)}{advice}"
        ) from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise bitsandbytes packs the weights anew at the first evaluation on a CPU, and
            # the model computes something else from then on.
            module.support_avx512bf16_for_cpu = False
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
    parameters = int(model.num_parameters())
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


def _check_architecture(found: Any, directory: Path) -> None:
    if found.is_encoder_decoder:
        raise ConfigError(
            f"model.path {directory} is an encoder-decoder ({found.model_type}), and msft-train "
            "trains causal language models: run MSFT around your own Trainer instead, with "
            "trainer.hf.MsftRun, as in docs/howto/any_trainer.md"
        )


def _quantization(config: ModelConfig) -> Any:
    """Return transformers' settings for frozen weights in fewer bits, or ``None``."""
    if config.quantization == "nf4":
        bits_and_bytes: Any = BitsAndBytesConfig
        return bits_and_bytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        )
    if config.quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - optional

        return TorchAoConfig(Int8WeightOnlyConfig())
    return None


def _locate(config: ModelConfig) -> Path:
    path = config.path
    directory = Path(path)
    if directory.is_dir():
        return directory.resolve()
    if directory.exists() or not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path {path} is not a directory: name a directory with a model, or a hub id "
            "such as Qwen/Qwen2.5-0.5B"
        )
    try:
        files = [*_HUB_FILES, *(["*.py"] if config.trust_remote_code else [])]
        return Path(snapshot_download(path, revision=config.revision, allow_patterns=files))
    except Exception as error:  # a missing model and no network raise different classes
        raise ConfigError(
            f"model.path {path} is not a directory, and it cannot be downloaded from the Hugging "
            f"Face hub: {first_line(error)}"
        ) from error
