"""Checkpoints of the real language model while it learns from real texts, in six regimes.

``bench/data/smollm2/<regime>/step<N>.safetensors``: the model's weights after N steps, with the
names of ``model.state_dict()`` and the tied output layer left out; step 0 is the base. Of the
regime ``lora`` only the adapter is saved. A step has 256 tokens, 64 of each kind of text, and AdamW
updates with a constant learning rate and no weight decay.

- ``bf16-*``: the optimizer updates bf16 weights.
- ``masters-*``: it updates fp32 masters; gradients and snapshots are of their bf16 copies.
- ``lora``: it updates an fp32 adapter of rank 16 on all linear layers.

A regime whose last snapshot is there is not trained again. :mod:`bench.arena.changes` counts what
changed.

Example::

    python -m bench.arena.trajectories                          # half an hour of one core
    python -m bench.arena.trajectories --steps 16 lora          # one regime, fewer steps
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import peft
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench.arena.model import HOME, ensure
from bench.arena.texts import read, render

SUMMARY = "Train the real language model and keep checkpoints to measure on."
TOKENS = 64
"""Tokens of each kind of text in a step."""
STEPS = 200
SNAPSHOTS = (1, 2, 4, 8, 16, 32, 64, 100, 128, 150)
"""Steps after which a snapshot is written, besides the base and the last two."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """What is trained, how its weights are held, and how fast it learns."""

    lr: float
    masters: bool = False
    adapter: bool = False


REGIMES = {
    "bf16-1e-5": Regime(lr=1e-5),
    "bf16-2e-5": Regime(lr=2e-5),
    "masters-1e-6": Regime(lr=1e-6, masters=True),
    "masters-1e-5": Regime(lr=1e-5, masters=True),
    "masters-2e-5": Regime(lr=2e-5, masters=True),
    "lora": Regime(lr=1e-4, adapter=True),
}


def batches(tokenizer: PreTrainedTokenizerBase) -> Iterator[torch.Tensor]:
    """Yield batches of one sequence of each kind of text, from the beginning after the last."""
    streams = [
        chain.from_iterable(tokenizer(render(row, tokenizer)).input_ids for row in cycle(rows))
        for rows in read().values()
    ]
    while True:
        yield torch.tensor([[next(stream) for _ in range(TOKENS)] for stream in streams])


def load(base: Path, regime: Regime) -> torch.nn.Module:
    """Return the base model in bf16, with an adapter where the regime trains one."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if not regime.adapter:
        return model
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return peft.get_peft_model(model, settings)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors to save: the adapter's, or all of the model."""
    if isinstance(model, peft.PeftModel):
        return dict(peft.get_peft_model_state_dict(model))
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


def save(model: torch.nn.Module, file: Path, loss: float | None) -> None:
    """Write a snapshot, all of it or nothing.

    Args:
        model: The model.
        file: The snapshot's file.
        loss: Mean loss of the steps since the snapshot before, kept in the file's metadata.
    """
    scratch = file.with_suffix(".tmp")
    metadata = None if loss is None else {"loss": f"{loss:.4f}"}
    safetensors.torch.save_file(snapshot(model), scratch, metadata)
    os.replace(scratch, file)


def train(base: Path, folder: Path, regime: Regime, *, steps: int = STEPS) -> None:
    """Train in a regime and write its snapshots into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load(base, regime)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    held = [weight.detach().float() for weight in trained] if regime.masters else trained
    optimizer = torch.optim.AdamW(held, lr=regime.lr, weight_decay=0.0, fused=True)
    data = batches(AutoTokenizer.from_pretrained(base))
    losses: list[float] = []
    save(model, folder / "step0.safetensors", None)
    for step in range(1, steps + 1):
        tokens = next(data)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        if regime.masters:
            for master, weight in zip(held, trained, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if regime.masters:
            with torch.no_grad():
                for master, weight in zip(held, trained, strict=True):
                    weight.copy_(master)
        if step in SNAPSHOTS or step >= steps - 1:
            mean = sum(losses) / len(losses)
            save(model, folder / f"step{step}.safetensors", mean)
            print(f"{folder.name}: step {step}, loss {mean:.3f}", flush=True)
            losses.clear()


def main() -> None:
    """Make the trajectories that are not there."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=f"of {', '.join(REGIMES)}")
    parser.add_argument("--data", type=Path, default=HOME, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = ensure(options.data)
    for name in options.regimes or REGIMES:
        folder = options.data / name
        if not (folder / f"step{options.steps}.safetensors").is_file():
            train(base, folder, REGIMES[name], steps=options.steps)


if __name__ == "__main__":
    main()
