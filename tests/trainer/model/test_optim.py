"""Optimizers with moments in few bits, and weights that are rounded at random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from msft_store import Store
from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.journal import Journal
from trainer.model.optim import make_optimizer, set_learning_rate
from trainer.model.stochastic_rounding import round_stochastically
from trainer.model.training_state import load_optimizer, optimizer_tensors
from trainer.training import run
from trainer.training.run import resume, start

LOW_BIT = ["adam8bit", "adamw8bit", "adam4bit", "adamw4bit"]


@pytest.fixture
def _uncompiled(monkeypatch):
    """Run torchao's steps as they are, because to compile them takes ten seconds each."""
    pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f if f is not None else lambda g: g)


def make_weights(dtype=torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(128, 64, dtype=dtype)


def step(optimizer, model, count=1, lr=1e-3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        set_learning_rate(optimizer, lr)
        optimizer.step()


def test_rounding_at_random_is_exact_on_average_and_between_two_neighbours():
    torch.manual_seed(0)
    values = torch.full((200_000,), 1 + 2**-10)
    rounded = round_stochastically(values).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.mean() == pytest.approx(1 + 2**-10, rel=2e-5)
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert round_stochastically(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_in_float32_the_steps_are_those_of_torch(kind):
    found = []
    for rounds in (False, True):
        config = TrainConfig(optimizer=kind, stochastic_rounding=rounds, weight_decay=0.1)
        model = make_weights()
        optimizer = make_optimizer(config, model)
        step(optimizer, model, 3)
        found.append(model.weight.detach())
    torch.testing.assert_close(*found)


def test_small_updates_of_bf16_weights_add_up_only_if_they_are_rounded_at_random():
    moved = {}
    for rounds in (False, True):
        model = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(model.weight)
        optimizer = make_optimizer(TrainConfig(stochastic_rounding=rounds), model)
        for _ in range(20):
            model.weight.grad = torch.ones_like(model.weight)
            set_learning_rate(optimizer, 1e-4)
            optimizer.step()
        moved[rounds] = 1 - float(model.weight.detach().float().mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(20 * 1e-4, rel=0.2)


def test_random_numbers_follow_from_the_seed_and_the_step_and_leave_the_others_alone():
    def train(seed, draws):
        model = make_weights(torch.bfloat16)
        optimizer = make_optimizer(TrainConfig(stochastic_rounding=True), model, seed=seed)
        torch.manual_seed(draws)
        before = torch.get_rng_state()
        step(optimizer, model, 2)
        assert torch.equal(torch.get_rng_state(), before)
        return model.weight.detach()

    assert torch.equal(train(1, 2), train(1, 3))
    assert not torch.equal(train(1, 2), train(2, 2))


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("kind", LOW_BIT)
def test_moments_in_few_bits_are_saved_and_restored_exactly(kind):
    models = [make_weights(), make_weights()]
    optimizers = [make_optimizer(TrainConfig(optimizer=kind), model) for model in models]
    assert type(optimizers[0]).__name__.lower() == kind
    step(optimizers[0], models[0], 2)
    tensors = optimizer_tensors(optimizers[0])
    assert any(name.startswith("packed.") for name in tensors)
    moments = 2 * sum(parameter.nbytes for parameter in models[0].parameters())
    assert sum(tensor.nbytes for tensor in tensors.values()) < moments / 2
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer(optimizers[1], load(save(tensors)))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(optimizer, model)
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.usefixtures("_uncompiled")
def test_a_killed_run_with_moments_in_few_bits_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda directory: None)
    config = make_config(
        tmp_path, train__lr=0.02, log_every=1, msft__compute_budget=0.5, msft__max_stages=2
    )
    config = replace(
        config,
        resume_every=2,
        train=replace(config.train, optimizer="adam8bit"),
        msft=replace(config.msft, optimizer_on_rollback="restore"),
    )
    start(replace(config, output_dir=str(tmp_path / "whole")))
    config = replace(config, output_dir=str(tmp_path / "killed"))
    kill(lambda: start(config), Journal, "append", call=2, like={"event": "trained", "stage": 2})
    resume(tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert Store.open(Path(config.output_dir) / "store").check(read_data=True) == []


def test_settings_without_an_effect_or_a_package_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"weights in bfloat16, but model.dtype is float32"):
        make_config(tmp_path, train__stochastic_rounding=True)
    monkeypatch.setattr("trainer.config.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.optimizer adam4bit needs torchao"):
        make_config(tmp_path, train__optimizer="adam4bit")
