"""``lora``: only the adapter is trained, committed, rolled back and written."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from msft_store import Store
from tests.support.runs import kill, outcome
from tests.support.tiny_runs import make_config
from tests.support.together import together
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.journal import Journal, effective, read
from trainer.model.evaluate import Evaluator
from trainer.model.lora import load_for_training
from trainer.model.weights import weights_of
from trainer.report.flops import Account, ModelSize
from trainer.report.summary import summarize
from trainer.training import run
from trainer.training.run import resume, start
from trainer.training.workspace import open_workspace

LORA = {"r": 2, "alpha": 4, "dropout": 0.1}


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda d: summarize(read(Path(d) / "journal.jsonl")))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return the configuration of two stages with a roll-back, which take about a second."""
    at = tmp_path_factory.mktemp("lora")
    return make_config(at, lora=LORA, train__lr=0.02, train__max_grad_norm=1.0, log_every=1)


@pytest.fixture(scope="module")
def finished(config):
    at = Path(f"{config.output_dir}-finished")
    start(replace(config, output_dir=str(at)))
    return at


def records(at, event):
    return [r for r in effective(read(at / "journal.jsonl")) if r["event"] == event]


def test_the_adapter_alone_is_trained_and_stored(config, finished):
    store = Store.open(finished / "store")
    # Nothing of an adapter is in the base, so that its absence would only be warned of.
    assert store.get("result").base is None
    names = set(store.tensors(store.get("result")))
    assert names == set(weights_of(load_for_training(config).model))
    assert all(".lora_" in name for name in names)
    (started,) = records(finished, "run_started")
    adapter = sum(t.nbytes for t in store.load("result").values())
    assert started["full_checkpoint_bytes"] == adapter
    assert started["model"]["trainable"] == adapter // 4
    assert any(r["decision"] == "roll_back" for r in records(finished, "decided"))


def test_the_whole_store_is_smaller_than_the_base(config, finished):
    size = sum(path.stat().st_size for path in (finished / "store").rglob("*") if path.is_file())
    assert size < sum(p.stat().st_size for p in Path(config.model.path).glob("*.safetensors"))


def test_the_base_is_as_it_was_until_the_end(config, monkeypatch):
    before = load_for_training(config).model.state_dict()
    frozen = [name for name in before if ".lora_" not in name]
    seen, call = [], Evaluator.__call__

    def watching(self, model, *arguments):
        seen.append({name: model.state_dict()[name].clone() for name in frozen})
        return call(self, model, *arguments)

    monkeypatch.setattr(Evaluator, "__call__", watching)
    start(replace(config, output_dir=f"{config.output_dir}-watched"))
    assert len(seen) > 3
    assert all(torch.equal(one[name], before[name]) for one in seen for name in frozen)


@pytest.fixture(scope="module")
def with_head(config):
    """Return the run directory of an adapter whose model also trains its output layer."""
    lora = replace(config.lora, modules_to_save=("lm_head",))
    at = Path(f"{config.output_dir}-head")
    start(replace(config, output_dir=str(at), lora=lora))
    return at


def test_modules_to_save_are_trained_stored_and_written_whole(config, with_head):
    head = "base_model.model.lm_head.weight"
    before = load_for_training(config).model.state_dict()["lm_head.weight"]
    stored = Store.open(with_head / "store").load("result")
    assert stored[head].shape == before.shape
    assert not torch.equal(stored[head], before)
    assert not any("modules_to_save" in name or "original_module" in name for name in stored)


def test_an_export_warns_of_what_peft_would_round_besides_the_adapter(
    finished, with_head, tmp_path, caplog
):
    Store.open(finished / "store").export("result", tmp_path / "adapter")
    assert caplog.text == ""
    Store.open(with_head / "store").export("result", tmp_path / "with_head")
    assert "1 tensor besides the adapter (base_model.model.lm_head.weight)" in caplog.text


@pytest.mark.parametrize("directory", ["finished", "with_head"])
def test_peft_loads_the_result_as_it_was_tested(directory, request):
    finished = request.getfixturevalue(directory)
    config = load_config(finished / "config.yaml")
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype="auto")
    model = PeftModel.from_pretrained(base, finished / "model")
    written = load_file(finished / "model" / "adapter_model.safetensors")
    stored = Store.open(finished / "store").load("result")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    with open_workspace(config) as work:
        evaluator = Evaluator(work.config.evaluation, work.loaded, work.accelerator)
        examples = work.split("test")
        as_the_base = evaluator(work.loaded.model, examples).metrics
        merged = evaluator(model.merge_and_unload(), examples).metrics
    tested = {r["what"]: r["metrics"] for r in records(finished, "tested")}
    assert merged == pytest.approx(tested["result"], rel=1e-4)
    assert as_the_base == tested["base"]
    assert tested["base"] != tested["result"]


def test_a_fresh_adapter_follows_from_the_seed_alone(config):
    torch.manual_seed(1)
    first = weights_of(load_for_training(config).model)
    torch.manual_seed(2)
    again = weights_of(load_for_training(config).model)
    other = weights_of(load_for_training(replace(config, seed=1)).model)
    state = torch.get_rng_state()
    load_for_training(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("restores", "resume_every", "call", "like"),
    [
        ("reset", None, 3, {"event": "trained", "stage": 1}),
        ("reset", 2, 3, {"event": "trained", "stage": 2}),
        ("restore", 2, 3, {"event": "trained", "stage": 2}),
        ("restore", None, 1, {"event": "stage_started", "stage": 2}),
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
    if resume_every:
        # Adapter and two moments, but not the base.
        assert (killed / "resume.safetensors").stat().st_size < 60_000
    resume(killed)
    assert outcome(killed) == outcome(whole)
    assert Store.open(killed / "store").check(read_data=True) == []


def test_settings_that_must_not_change_the_result(config, finished):
    def result(**changes):
        at = Path(f"{config.output_dir}-{'-'.join(changes)}")
        start(replace(config, output_dir=str(at), **changes))
        return outcome(at)[1]

    expected = outcome(finished)[1]
    assert result(async_save=False) == expected
    assert result(resident_reference=True) == expected
    assert result(model=replace(config.model, gradient_checkpointing=True)) == expected


def test_two_processes_have_one_adapter(config, tmp_path):
    path = str(Path(config.output_dir).parent / "config.yaml")
    ways = [["run", path, f"output_dir={tmp_path / n}", "--quiet"] for n in ("1", "2")]
    overrides = ["lora.dropout=0", "msft.max_stages=2"]
    assert main(ways[0] + overrides) == 0
    assert together(lambda rank: main(ways[1] + overrides), tmp_path) == {0: 0, 1: 0}
    one, two = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("1", "2"))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    first = [records(tmp_path / n, "evaluated")[1]["metrics"] for n in ("1", "2")]
    assert first[1] == pytest.approx(first[0], rel=1e-4)


def test_frozen_weights_take_no_gradient():
    everything = ModelSize(parameters=100, layers=2, hidden=5)
    adapter = ModelSize(parameters=100, trainable=10, layers=2, hidden=5)
    assert adapter.forward(7, 11) == everything.forward(7, 11) == 2 * 100 * 7 + 4 * 2 * 5 * 11
    assert everything.training(7, 11) == 6 * 100 * 7 + 12 * 2 * 5 * 11
    assert adapter.training(7, 11) == (4 * 100 + 2 * 10) * 7 + 12 * 2 * 5 * 11


def test_the_account_of_a_run_counts_its_training_flops(finished):
    journal = read(finished / "journal.jsonl")
    (started,) = records(finished, "run_started")
    model = {key: started["model"][key] for key in ("parameters", "trainable", "layers", "hidden")}
    size = ModelSize(**model)
    trained = [r for r in journal if r["event"] == "trained"]
    flops = sum(size.training(r["tokens"], r["attention_tokens"]) for r in trained)
    assert Account.from_journal(journal).trained.flops == flops
    before = [{**r, "model": {k: v for k, v in r["model"].items() if k != "trainable"}}
              if r["event"] == "run_started" else r for r in journal]  # fmt: skip
    assert Account.from_journal(before).trained.flops > 1.3 * flops


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 0}, "lora.r must be at least 1, got 0"),
        ({"alpha": 0}, "lora.alpha must be at least 1"),
        ({"dropout": 1.0}, "lora.dropout must be from 0 to below 1"),
        ({"target_modules": []}, "lora.target_modules must be names"),
        ({"target_modules": "q_proj"}, "lora.target_modules must be a list"),
        ({"rank": 3}, "unknown key 'lora.rank'"),
    ],
)
def test_a_section_that_cannot_work_is_refused(tmp_path, lora, words):
    with pytest.raises(ConfigError, match=words):
        make_config(tmp_path, lora=lora)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "no module 'v_prj'; did you mean 'v_proj'"),
        ({"modules_to_save": ["lm_hed"]}, "lora.modules_to_save: the model has no module 'lm_hed'"),
        ({"target_modules": ["norm"]}, "lora does not fit the model: .*not supported"),
        ({"r": 64}, "lora.r is 64, but no target layer has a rank above 32"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(tmp_path, lora, words):
    config = make_config(tmp_path, lora=lora)
    with pytest.raises(ConfigError, match=words):
        start(config)
    assert not Path(config.output_dir).exists()


def test_targets_and_dtype_are_as_asked_for(tmp_path):
    config = make_config(tmp_path, lora={"r": 1, "target_modules": ["v_proj"], "dtype": "bfloat16"})
    weights = weights_of(load_for_training(config).model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in weights} == {"v_proj"}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    (tmp_path / "again.yaml").write_text((tmp_path / "config.yaml").read_text())
    again = load_config(tmp_path / "again.yaml", overrides=["lora=null"])
    assert again.lora is None


def test_without_peft_the_message_says_how_to_install_it(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'msft-store\[trainer,lora\]'"):
        load_for_training(config)
