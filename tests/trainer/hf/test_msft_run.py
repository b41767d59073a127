"""MSFT around the Hugging Face Trainer: the same decisions, weights and resume as `msft-train`."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from msft_store import Store, Timeline
from tests.support.ranks import in_ranks
from tests.support.runs import die_after, kill
from tests.support.tiny_runs import make_config, make_tokenizer
from trainer.data.batches import DataOrder
from trainer.data.load import load_mixture
from trainer.errors import ConfigError, RunError
from trainer.hf import MsftRun
from trainer.hf import run as hf_run
from trainer.journal import Journal, effective, read
from trainer.training.run import resume, start

BATCH = 16
SETTINGS = {"compute_budget": 2.0, "eval_every": 0.5, "max_stages": 3}


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Drawing the plots of a report would take most of the time here."""
    monkeypatch.setattr(hf_run, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration of a small run of `msft-train`, whose model and data all tests use."""
    changes = {"train__optimizer": "adamw", "train__micro_batch_size": BATCH, "train__lr": 0.02}
    return make_config(tmp_path_factory.mktemp("msft-run"), **changes)


@pytest.fixture(scope="module")
def mixture(config):
    """The examples of that run as rows of token ids and labels."""

    def rows(split):
        return [
            {
                "input_ids": [*e.prompt, *e.completion],
                "labels": [*[-100] * len(e.prompt), *e.completion],
            }
            for e in split.examples
        ]

    loaded = load_mixture(config.data, make_tokenizer())
    return {name: (rows(sub.train), rows(sub.validation)) for name, sub in loaded.items()}


def load_model(config):
    return AutoModelForCausalLM.from_pretrained(config.model.path)


def collate(rows):
    """Pad on the right; the mask is what the Trainer's own collators give."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill):
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 1),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def make_trainer(model, train_dataset, eval_dataset, callbacks, cls=Trainer, **overrides):
    own = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 64,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return cls(
        model=model,
        args=TrainingArguments(**{**own, **overrides}),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        callbacks=callbacks,
    )


def make_adapted(model, **arguments):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    return make_trainer(get_peft_model(model, adapter), **arguments)


def run_in(directory, config, mixture, *, make=make_trainer, base=True, **settings):
    model = load_model(config)
    path = config.model.path if base else None
    settings = {**SETTINGS, **settings}
    return MsftRun(make, model, mixture, output_dir=directory, base=path, **settings).train()


def decided(directory):
    fields = ("stage", "index", "step", "decision", "exclude")
    records = effective(read(Path(directory) / "journal.jsonl"))
    return [tuple(map(str, map(r.get, fields))) for r in records if r["event"] == "decided"]


def bits(tensors):
    return {name: t.detach().contiguous().view(torch.uint8) for name, t in tensors.items()}


def assert_equal_weights(one, other):
    one, other = bits(one), bits(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def reference(config, mixture, tmp_path_factory):
    """The result and the directory of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_run, "write_report", lambda directory: None)
        directory = tmp_path_factory.mktemp("reference") / "run"
        return run_in(directory, config, mixture), directory


def test_a_run_goes_back_excludes_and_gives_the_model_the_result(reference, config):
    result, directory = reference
    kinds = {record["decision"] for record in result.decisions}
    assert kinds == {"continue", "roll_back", "stop"}
    assert any(record["exclude"] for record in result.decisions)
    store = Store.open(directory / "store")
    assert [checkpoint.id for checkpoint in store.log()] == [result.checkpoint.id]
    names = store.tensors(result.checkpoint.id)
    state = {n: t for n, t in result.model.state_dict().items() if n in names}
    assert_equal_weights(state, store.load(result.checkpoint.id))
    assert store.check(read_data=True) == []


class OrderedTrainer(Trainer):
    """A Trainer that takes the examples in the order of `msft-train`."""

    stages: Iterator[list[int]]

    def _get_train_sampler(self, train_dataset=None):
        return next(type(self).stages)


def test_its_decisions_are_those_of_msft_train_with_the_same_order(config, mixture, tmp_path):
    settings = replace(config, output_dir=str(tmp_path / "ours"))
    start(settings)
    records = effective(read(tmp_path / "ours" / "journal.jsonl"))
    sizes = {name: len(rows) for name, (rows, _) in mixture.items()}

    def order_of(record):
        active = {name: sizes[name] for name in record["active"]}
        order = DataOrder.fresh(seed=0, stage=record["stage"], sizes=active, batch_size=BATCH)
        starts = dict(zip(active, itertools.accumulate(active.values(), initial=0), strict=False))
        steps = range(record["steps"])
        return [starts[name] + i for step in steps for name, i in order.step(step)]

    class EpochOrder(torch.utils.data.Sampler):
        def __init__(self, places, size):
            self.places, self.size, self.epoch = places, size, 0

        def __len__(self):
            return self.size

        def __iter__(self):
            begin, self.epoch = self.epoch * self.size, self.epoch + 1
            return iter(self.places[begin : begin + self.size])

    starts = [record for record in records if record["event"] == "stage_started"]
    OrderedTrainer.stages = iter(
        [EpochOrder(order_of(r), sum(sizes[name] for name in r["active"])) for r in starts]
    )

    def make(**arguments):
        return make_trainer(cls=OrderedTrainer, **arguments)

    run_in(tmp_path / "theirs", config, mixture, make=make)
    assert decided(tmp_path / "theirs") == decided(tmp_path / "ours")
    assert any("roll_back" in fields for fields in decided(tmp_path / "ours"))


PLACES = {
    "before the first stage": (Journal, "append", 1, {"event": "run_started"}),
    "in the first stage": (Timeline, "commit_async", 3, {}),
    "before a roll-back": (Journal, "append", 1, {"event": "decided", "decision": "roll_back"}),
    "after a roll-back": (Timeline, "rollback", 1, {}),
    "in the second stage": (Timeline, "commit_async", 7, {}),
    "before the end": (Journal, "append", 1, {"event": "decided", "decision": "stop"}),
    "at the end": (Timeline, "close", 1, {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_changes_nothing(config, mixture, reference, tmp_path, place):
    result, _ = reference
    owner, name, call, like = PLACES[place]
    kill(lambda: run_in(tmp_path, config, mixture), owner, name, call=call, like=like)
    resumed = run_in(tmp_path, config, mixture)
    assert resumed.checkpoint.id == result.checkpoint.id
    assert decided(tmp_path) == decided(reference[1])
    assert_equal_weights(resumed.model.state_dict(), result.model.state_dict())
    again = run_in(tmp_path, config, mixture)
    assert_equal_weights(again.model.state_dict(), result.model.state_dict())


def test_an_adapter_is_rolled_back_and_resumed(config, mixture, tmp_path):
    torch.manual_seed(1)
    result = run_in(tmp_path / "whole", config, mixture, make=make_adapted, base=False)
    assert any(record["decision"] == "roll_back" for record in result.decisions)
    (tmp_path / "killed").mkdir()
    torch.manual_seed(1)

    def train():
        return run_in(tmp_path / "killed", config, mixture, make=make_adapted, base=False)

    kill(train, Timeline, "commit_async", call=7)
    torch.manual_seed(2)  # another process makes another adapter
    resumed = train()
    assert resumed.checkpoint.id == result.checkpoint.id
    assert_equal_weights(resumed.model.state_dict(), result.model.state_dict())
    full = sum(t.nbytes for t in load_model(config).state_dict().values())
    assert resumed.checkpoint.logical_bytes < full / 10


def with_a_tensor_as_rate(model, **arguments):
    """The optimizers of torchao hold the learning rate as a tensor."""
    rate = torch.tensor(0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    trainer = make_trainer(model, **arguments)
    trainer.optimizer = optimizer
    return trainer


def test_a_learning_rate_that_is_a_tensor_is_recorded(config, mixture, tmp_path):
    run_in(tmp_path, config, mixture, make=with_a_tensor_as_rate)
    trained = [r for r in read(tmp_path / "journal.jsonl") if r["event"] == "trained"]
    assert {round(record["lr"], 6) for record in trained} == {0.02}


class Stopper(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def stopping(callbacks, **arguments):
    return make_trainer(callbacks=[*callbacks, Stopper()], **arguments)


def deaf(callbacks, **arguments):
    return make_trainer(callbacks=[], **arguments)


def with_own_steps(**arguments):
    return make_trainer(**{**arguments, "max_steps": 3})


def with_a_copy(model, **arguments):
    return make_trainer(model=type(model)(model.config), **arguments)


def with_fsdp(make=make_trainer, version=2, **arguments):
    trainer = make(**arguments)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return trainer


def with_fsdp_of_an_adapter(**arguments):
    return with_fsdp(make_adapted, **arguments)


def with_fsdp_1(**arguments):
    return with_fsdp(version=1, **arguments)


def with_fsdp_and_compilation(**arguments):
    return with_fsdp(torch_compile=True, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (stopping, "remove callbacks that stop training"),
        (deaf, "must give the callbacks"),
        (with_own_steps, "pass its overrides on"),
        (with_a_copy, "another model"),
        (with_fsdp_1, "version 2 of FSDP alone"),
        (with_fsdp_of_an_adapter, "an adapter under FSDP"),
        (with_fsdp_and_compilation, "torch_compile under FSDP"),
    ],
)
def test_a_trainer_that_cannot_be_a_stage_is_refused(config, mixture, tmp_path, make, message):
    with pytest.raises((ConfigError, RunError), match=message):
        run_in(tmp_path, config, mixture, make=make)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ies"}, "no losses of single examples"),
        ({"excluded_every": 2}, "evaluation.excluded_every: a Trainer.s stage is evaluated on all"),
        ({"method": "dynamix"}, "'dynamix' does not work around a Trainer, which takes back no"),
        ({"metric": "rouge"}, "give mode="),
        ({"msft_window": 2}, "msft_window"),
        ({"mode": "max", "metric": "blue"}, "reports no metric 'blue'"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(config, mixture, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_in(tmp_path, config, mixture, **changes)


def test_a_mixture_that_cannot_be_divided_is_refused(config, mixture, tmp_path):
    rows = mixture["sum"][0]
    with pytest.raises(ConfigError, match="must be a pair"):
        run_in(tmp_path, config, {"sum": rows})
    with pytest.raises(ConfigError, match="has no length"):
        run_in(tmp_path, config, {"sum": (iter(rows), rows)})
    with pytest.raises(ConfigError, match="is empty"):
        run_in(tmp_path, config, {"sum": (rows, [])})


def test_tables_without_a_common_column_are_refused(config, tmp_path):
    pairs = Dataset.from_list([{"prompt": "1+1=", "completion": "2"}])
    chats = Dataset.from_list([{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ConfigError, match="'chat' has messages; 'sum' has prompt, completion"):
        run_in(tmp_path, config, {"sum": (pairs, pairs), "chat": (chats, chats)})


def test_msft_run_and_msft_train_do_not_continue_each_others_runs(
    config, mixture, reference, tmp_path
):
    start(replace(config, output_dir=str(tmp_path / "ours")))
    journal = tmp_path / "ours" / "journal.jsonl"
    before = journal.read_bytes()
    with pytest.raises(RunError, match="was begun by msft-train"):
        run_in(tmp_path / "ours", config, mixture)
    assert journal.read_bytes() == before
    with pytest.raises(RunError, match="begun around a Trainer"):
        resume(reference[1])


def test_a_run_with_other_settings_is_not_continued(config, mixture, reference, tmp_path):
    shutil.copytree(reference[1], tmp_path / "run")
    with pytest.raises(RunError, match="begun with"):
        run_in(tmp_path / "run", config, mixture, seed=5)


def test_single_rollout_leaves_sub_datasets_out_within_its_second_stage(config, mixture, tmp_path):
    result = run_in(tmp_path, config, mixture, method="single_rollout")
    started = [r for r in read(tmp_path / "journal.jsonl") if r["event"] == "stage_started"]
    assert [bool(record["limits"]) for record in started] == [False, True]
    trained = [r for r in read(tmp_path / "journal.jsonl") if r["event"] == "trained"]
    assert sum(r["target_tokens"] for r in trained if r["stage"] == 2) < sum(
        r["target_tokens"] for r in trained if r["stage"] == 1
    )
    assert result.decisions[-1]["decision"] == "stop"


def shortened(train_dataset, **arguments):
    return make_trainer(train_dataset=train_dataset[:-1], **arguments)


def test_single_rollout_needs_a_row_for_each_row(config, mixture, tmp_path):
    with pytest.raises(ConfigError, match="turn packing off"):
        run_in(tmp_path, config, mixture, make=shortened, method="single_rollout")


def test_sub_datasets_may_have_metrics_of_their_own(config, mixture, tmp_path):
    metric = {"copy": "loss", "same": "loss", "sum": "model_score"}
    mode = {"copy": "min", "same": "min", "sum": "max"}

    class Scored(Trainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs["metric_key_prefix"]
            output.metrics[f"{prefix}_model_score"] = 1 / output.metrics[f"{prefix}_loss"]
            return output

    def make(**arguments):
        return make_trainer(cls=Scored, **arguments)

    run_in(tmp_path, config, mixture, make=make, metric=metric, mode=mode)
    counted = effective(read(tmp_path / "journal.jsonl"))
    assert counted[0]["mode"] == "max"
    assert counted[0]["modes"] == {"copy": "min", "same": "min"}
    evaluated = [r for r in counted if r["event"] == "evaluated"]
    base = evaluated[0]["metrics"]
    assert base["overall"] == 0.0
    for record in evaluated:
        values = record["metrics"]
        assert values["sum"] == pytest.approx(1 / record["losses"]["sum"])
        better = [1 - values[name] / base[name] for name in ("copy", "same")]
        better.append(values["sum"] / base["sum"] - 1)
        assert values["overall"] == pytest.approx(sum(better) / 3)
    ends = [r for r in counted if r["event"] == "decided" and r["exclude"]]
    for record in ends:
        curve = [r["metrics"] for r in evaluated if r["stage"] == record["stage"]]
        best = {
            name: (max if way == "max" else min)(
                range(len(curve)), key=lambda i, name=name: curve[i][name]
            )
            for name, way in mode.items()
        }
        active = next(
            r["active"] for r in counted
            if r["event"] == "stage_started" and r["stage"] == record["stage"]
        )  # fmt: skip
        assert record["exclude"] == [min(active, key=lambda name, best=best: (best[name], name))]


def test_metrics_in_several_units_have_no_mean(config, mixture, tmp_path):
    with pytest.raises(ConfigError, match="would add up different metrics"):
        run_in(
            tmp_path, config, mixture,
            metric={"copy": "loss", "same": "loss", "sum": "loss"},
            mode={"copy": "min", "same": "max", "sum": "min"},
            overall="examples",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="give one for each"):
        run_in(tmp_path, config, mixture, metric={"copy": "loss"})


class ShardedTrainer(Trainer):
    """A Trainer that shards on a CPU, which Accelerate requests of accelerators alone.

    It states what Accelerate states there; all that follows from it is Accelerate's own.
    """

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def make_sharded(**arguments):
    sharded = {"cls": ShardedTrainer, "fsdp": True, "fsdp_config": {"version": 2}}
    return make_trainer(**{**sharded, **arguments})


@pytest.mark.parametrize("make_one", [make_trainer, make_sharded])
def test_two_processes_end_with_the_same_weights_and_resume(config, mixture, tmp_path, make_one):
    def train(rank, name):
        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
        AcceleratorState._reset_state(reset_partial_state=True)

        def make(**arguments):
            half = {"per_device_train_batch_size": BATCH // 2, "ddp_backend": "gloo"}
            return make_one(**{**half, **arguments})

        short = {"eval_every": 1.0, "max_stages": 2}
        result = run_in(tmp_path / name, config, mixture, make=make, **short)
        state = result.model.state_dict()
        whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
        saved = Store.open(tmp_path / name / "store").load(result.checkpoint.id)
        assert_equal_weights({n: whole[n] for n in saved}, saved)

    def broken(rank):
        if rank == 0:
            die_after(*KILLED[make_one], call=4)
        train(rank, "broken")

    assert in_ranks(2, lambda rank: train(rank, "whole"), tmp_path) == [0, 0]
    assert in_ranks(2, broken, tmp_path)[0] == 9
    assert in_ranks(2, lambda rank: train(rank, "broken"), tmp_path) == [0, 0]
    assert decided(tmp_path / "broken") == decided(tmp_path / "whole") == SHORT
    stores = [Store.open(tmp_path / name / "store") for name in ("whole", "broken")]
    (result,), (resumed,) = (store.log() for store in stores)
    assert result.id == resumed.id
    pieces = {len(entry.pieces) for entry in stores[0].tensors(result).values()}
    assert max(pieces) == (2 if make_one is make_sharded else 1)


SHORT = [
    ("1", "0", "0", "continue", "[]"),
    ("1", "1", "4", "continue", "[]"),
    ("1", "2", "8", "roll_back", "['copy']"),
    ("2", "0", "8", "continue", "[]"),
    ("2", "1", "11", "continue", "[]"),
    ("2", "2", "14", "stop", "[]"),
]
"""The decisions, which are the same whether every process has the whole model or its part."""
KILLED = {make_trainer: (Timeline, "commit_async"), make_sharded: (Timeline, "commit")}
"""What a process is killed after: a sharded model is committed at once."""
