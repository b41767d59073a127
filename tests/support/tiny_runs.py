"""A tiny model, tokenizer and mixture, made in code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trainer.config.load import load_config
from trainer.config.schema import Config, DataConfig, FieldsConfig, SubDatasetConfig
from trainer.data.examples import Split
from trainer.data.load import load_mixture

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
MAX_LENGTH = 24


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with EOS, padding and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<eos>", "<pad>", "<bos>"]
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        bos_token="<bos>" if bos else None,
        chat_template=CHAT_TEMPLATE,
    )
    if bos:
        wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
    return wrapped


def load_split(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    limit: int | None = None,
    fields: FieldsConfig | None = None,
) -> Split:
    """Return the first ``limit`` usable examples of a file."""
    files = SubDatasetConfig(train=str(path), validation=str(path), fields=fields)
    data = DataConfig(sub_datasets={"a": files}, max_length=max_length)
    return load_mixture(data, tokenizer, max_validation=limit)["a"].validation


def make_model(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Return a Qwen2 of about 50 thousand parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def write_model(directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model and its tokenizer as a Hugging Face directory."""
    make_model(dtype=dtype).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_lines(path: Path, records: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write JSON Lines; a string is a line as it stands."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_mixture(directory: Path) -> Path:
    """Write three sub-datasets of different length and difficulty."""
    letters = "abcdefghij"
    records = {
        "copy": [{"prompt": f"{a}{b}=", "completion": f"{a}{b}"} for a in letters for b in "xyz"],
        "same": [{"prompt": f"say {a}{b}:", "completion": "ok"} for a in letters for b in "pq"],
        "sum": [
            {"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)
        ],
    }
    for name, lines in records.items():
        write_lines(directory / f"{name}.train.jsonl", lines[: len(lines) * 2 // 3])
        write_lines(directory / f"{name}.validation.jsonl", lines[len(lines) * 2 // 3 :][:6])
        write_lines(directory / f"{name}.test.jsonl", lines[-4:])
    return directory


def make_config(directory: Path, **changes: Any) -> Config:
    """Write model and mixture below ``directory`` once; return a run's configuration.

    ``changes`` have dotted keys with ``__`` for the dot, as in ``train__lr=0.01``.
    """
    if not (directory / "base").exists():
        write_mixture(directory / "data")
        write_model(directory / "base")
    tree: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "log_every": 2,
        "method": "msft",
        "average": {"kind": "none"},
        "model": {"path": "base", "dtype": "float32"},
        "data": {"directory": "data", "max_length": MAX_LENGTH},
        "train": {"lr": 0.01, "batch_size": 16, "micro_batch_size": 8},
        "evaluation": {"eval_every": 0.5, "metric": "loss", "max_new_tokens": 4},
        "msft": {"compute_budget": 2.0, "max_stages": 3},
    }
    for key, value in changes.items():
        *parents, name = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(path)
