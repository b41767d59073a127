"""The dtypes of the weights, of the computation and of the checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from msft_store import Store
from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config, make_model
from trainer.errors import ConfigError
from trainer.journal import Journal, effective, read
from trainer.model.evaluate import Evaluator
from trainer.model.forward import collate, compute_in, target_losses
from trainer.model.weights import Snapshots, weights_of
from trainer.report.summary import summarize
from trainer.training import run
from trainer.training.run import resume, start
from trainer.training.workspace import open_workspace


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda d: summarize(read(Path(d) / "journal.jsonl")))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return a configuration with float32 weights, bfloat16 computation and checkpoints."""
    return make_config(
        tmp_path_factory.mktemp("precision"),
        train__lr=0.02,
        train__compute_dtype="bfloat16",
        snapshot_dtype="bfloat16",
        log_every=1,
    )


@pytest.fixture(scope="module")
def finished(config):
    at = Path(f"{config.output_dir}-finished")
    start(replace(config, output_dir=str(at)))
    return at


def records(at, event):
    return [r for r in effective(read(at / "journal.jsonl")) if r["event"] == event]


def test_checkpoints_and_result_are_rounded(config, finished):
    stored = Store.open(finished / "store").load("result")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    written = load_file(finished / "model" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in written.items())
    loaded = AutoModelForCausalLM.from_pretrained(finished / "model", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    (started,) = records(finished, "run_started")
    exact = start(replace(config, output_dir=f"{config.output_dir}-exact", snapshot_dtype=None))
    assert started["full_checkpoint_bytes"] * 2 == exact.disk.checkpoint_bytes
    assert summarize(read(finished / "journal.jsonl")).disk.peak_bytes < exact.disk.peak_bytes


def test_metrics_are_those_of_the_stored_weights(config, finished):
    assert any(r["decision"] == "roll_back" for r in records(finished, "decided"))
    store = Store.open(finished / "store")
    chosen = records(finished, "decided")[-1]["checkpoint"]
    recorded = next(r for r in records(finished, "evaluated") if r["checkpoint"] == chosen)
    with open_workspace(replace(config, output_dir=str(finished))) as work:
        work.snapshots.restore(store.load("result"))
        evaluator = Evaluator(work.config.evaluation, work.loaded, work.accelerator)
        again = {n: evaluator(work.model, work.split(n)).metrics for n in ("validation", "test")}
    (result,) = [r for r in records(finished, "tested") if r["what"] == "result"]
    assert again == {"validation": recorded["metrics"], "test": result["metrics"]}


@pytest.mark.parametrize(
    ("restores", "resume_every", "call", "like"),
    [
        ("reset", None, 3, {"event": "trained", "stage": 1}),
        ("reset", None, 3, {"event": "trained", "stage": 2}),
        ("reset", 1, 3, {"event": "trained", "stage": 2}),
        ("reset", 2, 1, {"event": "decided", "decision": "stop"}),
        ("restore", None, 2, {"event": "trained", "stage": 2}),
        ("restore", 2, 3, {"event": "trained", "stage": 2}),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(config, restores, resume_every, call, like):
    config = replace(config, msft=replace(config.msft, optimizer_on_rollback=restores))
    whole, killed = (Path(f"{config.output_dir}-{restores}{n}") for n in ("", "-killed"))
    if not whole.exists():
        start(replace(config, output_dir=str(whole)))
    shutil.rmtree(killed, ignore_errors=True)
    config = replace(config, output_dir=str(killed), resume_every=resume_every)
    kill(lambda: start(config), Journal, "append", call=call, like=like)
    resume(killed)
    assert outcome(killed) == outcome(whole)


def test_settings_that_must_not_change_the_result(config, finished):
    def result(**changes):
        at = Path(f"{config.output_dir}-{'-'.join(changes)}")
        start(replace(config, output_dir=str(at), **changes))
        return outcome(at)

    expected = outcome(finished)
    assert result(async_save=False) == expected
    assert result(resident_reference=True) == expected


def test_rounding_leaves_the_trained_weights_unchanged():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshots = Snapshots(model, "bfloat16")
    taken = snapshots.take()
    with snapshots.as_committed():
        inside = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    assert all(torch.equal(inside[name], taken[name].float()) for name in taken)
    assert not all(torch.equal(inside[name], before[name]) for name in taken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())
    assert taken["lm_head.weight"].data_ptr() == taken["model.embed_tokens.weight"].data_ptr()


def test_an_error_in_an_evaluation_restores_the_weights():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    with pytest.raises(KeyboardInterrupt), Snapshots(model, "bfloat16").as_committed():
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_exact_snapshots_are_the_weights_themselves():
    model = make_model()
    snapshots = Snapshots(model, None)
    for tensors in (snapshots.take(), snapshots.make_buffers()):
        places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        assert places == {name: t.data_ptr() for name, t in model.state_dict().items()}


def test_masters_are_computed_with_in_bfloat16(config):
    with open_workspace(replace(config, output_dir=str(Path(config.output_dir).parent))) as work:
        rows = work.split("train")["copy"][:4]
        batch = collate(rows, pad_token_id=work.loaded.pad_token_id)
        losses, logits = target_losses(work.model, batch)
        assert (losses.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
        losses.sum().backward()
        assert {p.grad.dtype for p in work.model.parameters()} == {torch.float32}
    plain = make_model()
    exact, _ = target_losses(plain, batch)
    compute_in("bfloat16", plain, "cpu")
    rounded, _ = target_losses(plain, batch)
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__dtype": "float16"}, "model.dtype float16 would need a loss scaler"),
        ({"model__dtype": "bfloat16", "snapshot_dtype": "bfloat16"}, "rounds nothing"),
        ({"model__dtype": "bfloat16", "train__compute_dtype": "bfloat16"}, "is for weights in"),
        ({"snapshot_dtype": "float32"}, "snapshot_dtype must be one of bfloat16"),
        ({"train__compute_dtype": "float16"}, "train.compute_dtype must be one of bfloat16"),
        (
            {"lora": {"dtype": "bfloat16"}, "snapshot_dtype": "bfloat16"},
            "because lora.dtype is bfloat16",
        ),
    ],
)
def test_dtypes_that_contradict_each_other_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        make_config(tmp_path, **changes)
