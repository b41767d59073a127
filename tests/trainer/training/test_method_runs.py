"""The methods beside MSFT in real runs: after a kill, beside looking ahead, and with sampling."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config
from trainer.algorithms.base import Stage
from trainer.journal import Journal, effective, read
from trainer.model.training_state import optimizer_tensors
from trainer.training import observe, run
from trainer.training.run import resume, start
from trainer.training.stage import make_schedule

METHODS = (
    "continual",
    "single_rollout",
    "soft_single_rollout",
    "ies",
    "dynamix",
    "online",
    "averages",
    "sft_average",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "online": {
        "method": "online",
        "msft": {"smoothing": 1, "margin": 0.0, "patience": 1, "exclusion": "soft"}
        | {"return_margin": 0.2, "rollback_margin": 0.0},
        "average": {"kind": "greedy", "count": 3},
    },
    "averages": {
        "method": "msft",
        "msft": {"compute_budget": 2.0, "rollback_average": 3, "return_margin": 0.1}
        | {"root_peaks": False, "restart_warmup": 0.5, "overall_window": 2, "max_stages": 4},
        "average": {"kind": "best", "count": 3},
    },
    "soft_single_rollout": {
        "method": "single_rollout",
        "msft": {"exclusion": "soft", "floor": 0.3},
    },
    "sft_average": {"method": "sft", "average": {"kind": "decay", "count": 3}},
}
"""Settings of the runs that are not a method with its defaults."""


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Reports are written after the end, and drawing them would take half of the time here."""
    monkeypatch.setattr(run, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mixture of four steps an epoch, in which IES masters and DynamixSFT looks ahead often."""
    return make_config(
        tmp_path_factory.mktemp("methods"),
        train__lr=0.02,
        log_every=1,
        msft__compute_budget=4.0,
        ies={"delta": 0.3},
        dynamix={"every": 3, "examples": 4},
    )


def configure(config, name, directory):
    options = {"method": name} | OPTIONS.get(name, {})
    merged = {
        key: replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in options.items()
    }
    return replace(config, **merged, output_dir=directory)


@pytest.fixture(scope="module", params=METHODS)
def method(shared, request):
    """A method's configuration, and the outcome of an undisturbed run."""
    directory = f"{shared.output_dir}-{request.param}"
    config = configure(shared, request.param, directory)
    start(config)
    return config, outcome(Path(directory))


def events(directory, event):
    records = effective(read(Path(directory) / "journal.jsonl"))
    return [record for record in records if record["event"] == event]


PLACES = {
    "before a decision": ("evaluated", 5, {}),
    "in the middle of an epoch": ("trained", 11, {}),
    "at the end of the third epoch": ("trained", 12, {}),
    "late": ("trained", 15, {}),
}


@pytest.mark.parametrize("resume_every", [None, 5])
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_changes_nothing(method, place, resume_every):
    config, expected = method
    config = replace(config, output_dir=f"{config.output_dir}-killed", resume_every=resume_every)
    shutil.rmtree(config.output_dir, ignore_errors=True)
    event, number, fields = PLACES[place]
    kill(lambda: start(config), Journal, "append", call=number, like={"event": event, **fields})
    resume(config.output_dir)
    (story, weights), (wanted, result) = outcome(Path(config.output_dir)), expected
    # Steps that are repeated were followed by evictions, also of what only they would have kept.
    for found, record in zip(story, wanted, strict=True):
        kept, was_kept = found.pop("kept", {}), {**record}.pop("kept", {})
        assert kept.items() <= was_kept.items()
        assert found == {key: value for key, value in record.items() if key != "kept"}
    assert weights == result


@pytest.mark.parametrize("method", ["averages", "sft_average", "online"], indirect=True)
def test_averages_are_journaled_with_their_sources(method):
    config, _ = method
    averaged = events(config.output_dir, "averaged")
    known = {one["checkpoint"] for one in events(config.output_dir, "evaluated")}
    known |= {one["checkpoint"] for one in averaged}
    assert averaged
    assert all(one["weights"].keys() <= known for one in averaged)


@pytest.mark.parametrize("method", ["online"], indirect=True)
def test_one_pass_takes_no_more_steps_than_its_budget(method):
    config, _ = method
    (steps, *_) = (one["steps"] for one in events(config.output_dir, "stage_started"))
    changed = [one for one in events(config.output_dir, "decided") if "active" in one]
    assert changed
    assert max(one["step"] for one in events(config.output_dir, "trained")) <= steps


@pytest.mark.parametrize("method", ["soft_single_rollout"], indirect=True)
def test_the_second_run_goes_on_with_a_share_of_what_has_peaked(method):
    config, _ = method
    second = events(config.output_dir, "stage_started")[1]
    assert second["floor"] == 0.3
    assert second["limits"]
    sizes = {"copy": 20, "same": 13, "sum": 24}
    stage = Stage(
        number=2,
        active=tuple(second["active"]),
        epochs=second["epochs"],
        limits=second["limits"],
        shares=second["shares"],
        floor=0.3,
    )
    hard = make_schedule(config, replace(stage, floor=0.0, shares={}), sizes)
    assert second["steps"] == make_schedule(config, stage, sizes).steps >= hard.steps
    assert {*stage.trained} == {*sizes}


@pytest.mark.parametrize("method", ["ies"], indirect=True)
def test_mastered_examples_are_left_out_of_the_training(method):
    config, _ = method
    adjusted = events(config.output_dir, "adjusted")
    mastered = [sum(map(len, record["mastered"].values())) for record in adjusted]
    assert mastered[:2] == [0, 0], "three epochs make the first second difference"
    assert max(mastered) > 0
    trained = events(config.output_dir, "trained")
    assert sum(record["forward_tokens"] for record in trained) > 0


@pytest.mark.parametrize("method", ["dynamix"], indirect=True)
def test_the_weights_of_the_sub_datasets_follow_the_rewards(method):
    config, _ = method
    weights = [record["weights"] for record in events(config.output_dir, "adjusted")]
    assert len(weights) == 5, "16 steps, asked after each third one, not at the end"
    assert all(sum(row.values()) == pytest.approx(1) for row in weights)
    assert len({tuple(row.values()) for row in weights}) > 1


def test_looking_ahead_leaves_no_trace(shared, tmp_path, monkeypatch):
    probe, probes = observe.probe_sub_datasets, []

    def watched(work, stage, **arguments):
        before = state_of(work)
        found = probe(work, stage, **arguments)
        assert state_of(work) == before
        probes.append(found)
        return found

    monkeypatch.setattr(observe, "probe_sub_datasets", watched)
    train = replace(shared.train, optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0)
    start(replace(shared, method="dynamix", output_dir=str(tmp_path / "run"), train=train))
    assert len(probes) == 5


def state_of(work):
    """Everything that the next steps depend on, in bits."""
    tensors = {**work.loaded.model.state_dict(), **optimizer_tensors(work.optimizer)}
    bits = {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()
        for name, tensor in tensors.items()
    }
    rates = [group["lr"] for group in work.optimizer.param_groups]
    gradients = [p.grad is None for p in work.loaded.model.parameters()]
    return (
        bits,
        rates,
        gradients,
        torch.get_rng_state().tolist(),
        repr((random.getstate(), np.random.get_state())),
    )


@pytest.mark.parametrize("name", ["sft", "dynamix", "msft"])
def test_an_epoch_follows_the_shares_of_the_sampling(shared, tmp_path, name):
    data = replace(shared.data, sampling="equal")
    msft = replace(shared.msft, compute_budget=1.0, max_stages=2)
    config = replace(shared, method=name, output_dir=str(tmp_path / "run"), data=data, msft=msft)
    start(config)
    begun = events(config.output_dir, "stage_started")
    whole = sum(
        sub["train"] for sub in events(config.output_dir, "run_started")[0]["sub_datasets"].values()
    )
    third = round(whole / 3)
    assert [record["examples"] for record in begun] == [
        len(record["active"]) * third for record in begun
    ]
    assert len(begun) == (2 if name == "msft" else 1)
