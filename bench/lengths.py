"""A model and examples for measuring speed: texts of many lengths, of the standard library.

The model is of 5.3 M random parameters with 8,192 tokens, of which the example's tokenizer uses a
few hundred: what costs time, the output layer above all, is there all the same. Lengths of prompts
and completions are log-normal, as those of instruction data are.

Example::

    write(Path("bench/data/lengths"), train=48)     # base/, lengths.train.jsonl, config.yaml
"""

from __future__ import annotations

import inspect
import json
import random
import sysconfig
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from bench.trajectories import EXAMPLE

MODULES = ("argparse", "ast", "calendar", "difflib", "doctest", "inspect", "pydoc", "tarfile")
MAX_LENGTH = 512
CONFIG = """\
output_dir: runs/lengths
model: {path: base, dtype: bfloat16}
data: {directory: ., max_length: 512}
train: {optimizer: adam, lr: 1e-5, batch_size: 24, micro_batch_size: 8}
evaluation: {metric: loss, eval_every: 1, batch_size: 16}
msft: {compute_budget: 1}
"""


def write(directory: Path, *, train: int, validation: int = 16) -> Path:
    """Write model, tokenizer, examples and configuration; return the configuration's path."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "base")
    AutoTokenizer.from_pretrained(EXAMPLE / "base").save_pretrained(directory / "base")
    rng = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    for split, count in {"train": train, "validation": validation}.items():
        lines = [json.dumps(_example(text, rng)) + "\n" for _ in range(count)]
        (directory / f"lengths.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    path = directory / "config.yaml"
    path.write_text(inspect.cleandoc(CONFIG) + "\n", encoding="utf-8")
    return path


def _example(text: str, rng: random.Random) -> dict[str, str]:
    """Return two adjacent pieces of text as prompt and completion, about 2 bytes a token."""
    prompt, completion = (
        min(max(int(rng.lognormvariate(mean, 0.8)), 8), 400) for mean in (4.6, 4.9)
    )
    start = rng.randrange(len(text) - prompt - completion)
    end = start + prompt
    return {"prompt": text[start:end], "completion": text[end : end + completion]}
