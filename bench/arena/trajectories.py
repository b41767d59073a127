"""Checkpoints of the real language model while it learns from real texts, in six regimes.

``bench/data/smollm2/<regime>/step<N>.safetensors``: the model's weights after N steps, with the
names of ``model.state_dict()`` and the tied output layer left out; step 0 is the base. Of the
regime ``lora`` only the adapter is saved. A step has 256 tokens, 64 of each kind of text, and AdamW
updates with a constant learning rate and no weight decay.

- ``bf16-*``: the optimizer updates bf16 weights.
- ``masters-*``: it updates fp32 masters; gradients and snapshots are of their bf16 copies.
- ``lora``: it updates an fp32 adapter of rank 16 on all linear layers.

On a processor that is slow at bf16, products are computed in fp32 (:mod:`bench.arena.precision`).
The metadata of a snapshot have the settings and how products were computed. A regime whose last
snapshot is there, with the present settings, is not trained again. :mod:`bench.arena.changes`
counts what changed.

Example::

    python -m bench.arena.trajectories                          # half an hour of one core
    python -m bench.arena.trajectories --steps 16 lora          # one regime, fewer steps
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path

import peft
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench.arena.model import HOME, ensure
from bench.arena.precision import describe, fast_products
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


def steps(base: Path, regime: Regime) -> Iterator[tuple[torch.nn.Module, float]]:
    """Train in a regime; yield the model, the same object each time, and the loss of each step."""
    model = load(base, regime)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    held = [weight.detach().float() for weight in trained] if regime.masters else trained
    optimizer = torch.optim.AdamW(held, lr=regime.lr, weight_decay=0.0, fused=True)
    for tokens in batches(AutoTokenizer.from_pretrained(base)):
        with fast_products():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
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
        yield model, loss.item()


def settings_of(regime: Regime) -> str:
    """Return what decides a trajectory, as JSON; how long it is, is not part of it."""
    return json.dumps({**asdict(regime), "tokens": TOKENS})


def save(model: torch.nn.Module, file: Path, regime: Regime, loss: float | None = None) -> None:
    """Write a snapshot, all of it or nothing.

    Args:
        model: The model.
        file: The snapshot's file.
        regime: How the model was trained, kept in the file's metadata.
        loss: Mean loss of the steps since the snapshot before, kept there too.
    """
    scratch = file.with_suffix(".tmp")
    metadata = {"settings": settings_of(regime), "products": describe()}
    if loss is not None:
        metadata["loss"] = f"{loss:.4f}"
    safetensors.torch.save_file(snapshot(model), scratch, metadata)
    os.replace(scratch, file)


def is_complete(folder: Path, regime: Regime, last: int) -> bool:
    """Return True if a folder has the last snapshot of a regime with the present settings."""
    file = folder / f"step{last}.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, "pt") as snapshot:
        return (snapshot.metadata() or {}).get("settings") == settings_of(regime)


def train(base: Path, folder: Path, regime: Regime, last: int) -> None:
    """Train in a regime and write its snapshots into a folder, in the place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(load(base, regime), folder / "step0.safetensors", regime)
    losses: list[float] = []
    for step, (model, loss) in enumerate(islice(steps(base, regime), last), 1):
        losses.append(loss)
        if step in SNAPSHOTS or step >= last - 1:
            mean = sum(losses) / len(losses)
            save(model, folder / f"step{step}.safetensors", regime, mean)
            print(f"{folder.name}: step {step}, loss {mean:.3f}", flush=True)
            losses.clear()


def main() -> None:
    """Make the trajectories that are not complete."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=f"of {', '.join(REGIMES)}")
    parser.add_argument("--data", type=Path, default=HOME, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = ensure(options.data)
    for name in options.regimes or REGIMES:
        folder, regime = options.data / name, REGIMES[name]
        if not is_complete(folder, regime, options.steps):
            train(base, folder, regime, options.steps)


if __name__ == "__main__":
    main()
