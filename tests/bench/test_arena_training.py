"""The arena's training: products in fp32 change next to nothing, and nothing is repeated."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("peft")
from bench.arena import msft, precision, trajectories
from bench.arena.trajectories import REGIMES, Regime

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small base model; its batches are seeded random tokens."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(512, (4, 64), generator=generator) for _ in range(4)]
    monkeypatch.setattr(trajectories, "batches", lambda tokenizer: iter(data))
    monkeypatch.setattr(trajectories.AutoTokenizer, "from_pretrained", lambda path: None)
    return tmp_path / "base"


def states(base: Path, regime: Regime) -> list[dict[str, torch.Tensor]]:
    """Return copies of what is kept after each of three steps."""
    found = []
    for model, _ in islice(trajectories.steps(base, regime), 3):
        found.append({name: t.clone() for name, t in trajectories.snapshot(model).items()})
    return found


@pytest.mark.parametrize("name", ["bf16-1e-5", "masters-1e-5", "lora"])
def test_products_in_fp32_keep_the_same_tensors_and_change_as_many_weights(
    base, name, monkeypatch
) -> None:
    kept = {}
    for slow in (False, True):
        monkeypatch.setattr(precision, "is_slow", lambda slow=slow: slow)
        kept[slow] = states(base, REGIMES[name])
    start = trajectories.snapshot(trajectories.load(base, REGIMES[name]))

    for plain, cast in zip(kept[False], kept[True], strict=True):
        assert plain.keys() == cast.keys() == start.keys()
        assert [t.dtype for t in plain.values()] == [t.dtype for t in cast.values()]
        changed = [
            sum(int((state[name] != start[name]).sum()) for name in start)
            for state in (plain, cast)
        ]
        assert 0 < changed[0] == pytest.approx(changed[1], rel=0.03)


def test_only_products_of_bf16_are_cast(monkeypatch) -> None:
    monkeypatch.setattr(precision, "is_slow", lambda: True)
    wide, narrow = torch.full((2, 2), 1 + 2**-12), torch.full((2, 2), 1 + 2**-7).bfloat16()
    narrow.requires_grad_()
    with precision.fast_products():
        product = torch.matmul(narrow, narrow)
        assert product.grad_fn.name() == "ToCopyBackward0"
        assert (product.dtype, (wide @ wide).dtype) == (torch.bfloat16, torch.float32)
        assert (narrow + narrow).dtype == torch.bfloat16
        assert torch.equal(wide @ wide, torch.full((2, 2), 2 * (1 + 2**-12) ** 2))
    assert product[0, 0].detach() == torch.tensor(2 * (1 + 2**-7) ** 2).bfloat16()


def test_a_trajectory_is_trained_again_only_under_other_settings(base, tmp_path) -> None:
    regime, folder = Regime(lr=1e-5), tmp_path / "bf16-1e-5"
    assert not trajectories.is_complete(folder, regime, 2)
    trajectories.train(base, folder, regime, 2)

    assert sorted(file.name for file in folder.iterdir()) == [
        f"step{step}.safetensors" for step in range(3)
    ]
    assert trajectories.is_complete(folder, regime, 2)
    assert not trajectories.is_complete(folder, regime, 3)
    assert not trajectories.is_complete(folder, Regime(lr=2e-5), 2)


def test_an_msft_run_is_continued_only_under_the_same_settings(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(msft, "OUTPUT", tmp_path)
    monkeypatch.setattr(msft, "ABOUT", tmp_path / "about.json")
    settings = {"config": {"seed": 0}, "sizes": msft.SIZES}
    assert not msft.is_begun(settings)
    (tmp_path / msft.CONFIG).write_text("seed: 0\n")
    assert not msft.is_begun(settings)
    msft.ABOUT.write_text(json.dumps({"settings": settings}))

    assert msft.is_begun(settings)
    assert not msft.is_begun({**settings, "config": {"seed": 1}})
