"""Train with the Hugging Face Trainer and TRL's SFTTrainer and keep checkpoints in a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from msft_store import InvalidInputError, KeepLast, Store, UnknownCheckpointError
from msft_store.integrations.hf import StoreCallback
from msft_store.integrations.hf.peft import KeptModel
from tests.support.ranks import in_ranks
from tests.support.states import same_bits
from tests.support.trainers import Watch, losses, make_model, make_trainer, state_of

EXAMPLE = Path(__file__).parents[3] / "examples" / "stdlib_tasks"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_each_evaluation_is_a_commit_with_the_metrics_of_all_datasets(
    tmp_path: Path, base: Path
) -> None:
    callback = StoreCallback(tmp_path / "store", base=base, retention=KeepLast(9))
    watch = Watch()
    make_trainer(tmp_path / "run", make_model(), [callback, watch]).train()

    kept = callback.timeline.checkpoints()
    assert [checkpoint.step for checkpoint in kept] == [3, 6, 9, 10]
    for checkpoint in kept:
        assert checkpoint.metrics.keys() == {"eval_one_loss", "eval_two_loss"}
        assert same_bits(callback.store.load(checkpoint), watch.seen[checkpoint.step or 0])
        assert checkpoint.base == callback.base.id
    assert list((tmp_path / "run").glob("checkpoint-*")) == []
    assert callback.store.check() == []


def test_the_best_of_each_dataset_stays_and_is_restored(tmp_path: Path, base: Path) -> None:
    best = {"eval_one_loss": "min", "eval_two_loss": "max"}
    callback = StoreCallback(tmp_path / "store", base=base, best=best)
    watch = Watch()
    trainer = make_trainer(tmp_path / "run", make_model(), [callback, watch], eval_steps=1)
    trainer.train()
    log = trainer.state.log_history

    for metric, choose in (("eval_one_loss", min), ("eval_two_loss", max)):
        wanted = choose((e for e in log if metric in e), key=lambda e: e[metric])["step"]
        assert callback.best(metric).step == wanted
        callback.restore(trainer.model, callback.best(metric))
        assert same_bits(state_of(trainer.model), watch.seen[wanted])
    assert len(callback.timeline.checkpoints()) <= 3
    with pytest.raises(UnknownCheckpointError, match="eval_three"):
        callback.best("eval_three")


@pytest.mark.parametrize(
    ("killed", "saves"),
    [
        (Watch(5), {"save_steps": 2, "eval_steps": 4}),
        (Watch(8), {"save_strategy": "epoch", "eval_strategy": "epoch"}),
        (Watch(7), {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine"}),
        # This sampler draws the order of an epoch from the global generators.
        (Watch(8), {"train_sampling_strategy": "group_by_length", "background": True}),
        # A save at the end of an epoch comes before its evaluation.
        (Watch(evaluated=10), {"eval_strategy": "epoch", "save_steps": 5}),
        (Watch(2), {"eval_on_start": True, "eval_steps": 4}),
    ],
)
def test_a_run_that_was_killed_resumes_bit_for_bit(
    tmp_path: Path, base: Path, killed: Watch, saves: dict[str, Any]
) -> None:
    saves = dict(saves)
    options = {"base": base, "retention": KeepLast(9), "background": saves.pop("background", False)}

    def callback_at(name: str) -> StoreCallback:
        return StoreCallback(tmp_path / name, **options)

    whole = callback_at("whole")
    trainer = make_trainer(tmp_path / "a", make_model(), [whole], **saves)
    trainer.train(resume_from_checkpoint=whole.resume(tmp_path / "a"))
    broken = callback_at("broken")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "b", make_model(), [broken, killed], **saves).train()
    # This process continues, and so does its commit in the background.
    assert broken.timeline.checkpoints()

    again = callback_at("broken")
    resumed = make_trainer(tmp_path / "b", make_model(9), [again], **saves)
    folder = again.resume(tmp_path / "b")
    assert folder is not None
    resumed.train(resume_from_checkpoint=folder)

    assert same_bits(state_of(resumed.model), state_of(trainer.model))
    assert [c.id for c in again.timeline.checkpoints()] == [
        c.id for c in whole.timeline.checkpoints()
    ]
    assert losses(resumed) == losses(trainer)
    assert not Path(folder).exists()
    assert list((tmp_path / "b").glob("checkpoint-*")) == []


def test_two_processes_commit_once_and_resume_bit_for_bit(tmp_path: Path, base: Path) -> None:
    weights = tmp_path / "weights.safetensors"

    def run(rank: int, name: str, fail: int | None = None, goes_on: bool = True) -> Trainer:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
        AcceleratorState._reset_state(reset_partial_state=True)
        best = {"eval_one_loss": "min"}
        callback = StoreCallback(tmp_path / name, base=base, best=best, retention=KeepLast(9))
        watch = [Watch(fail)] if fail else []
        folder = tmp_path / f"{name}-run"
        trainer = make_trainer(folder, make_model(), [callback, *watch], ddp_backend="gloo")
        trainer.train(resume_from_checkpoint=callback.resume(folder) if goes_on else None)
        last = state_of(trainer.model)
        found = [callback.best("eval_one_loss").id]
        torch.distributed.broadcast_object_list(found)
        assert found == [callback.best("eval_one_loss").id]
        callback.restore(trainer.model, found[0])
        trainer.model.load_state_dict(last)
        return trainer

    def whole(rank: int) -> None:
        trainer = run(rank, "whole")
        if rank == 0:
            save_model(trainer.model, str(weights))

    def broken(rank: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(rank, "broken", fail=4)

    def resumed(rank: int) -> None:
        state = state_of(run(rank, "broken").model)
        expected = load_file(weights)
        assert same_bits({name: state[name] for name in expected}, expected)

    def refused(rank: int) -> None:
        with pytest.raises(InvalidInputError, match="has a run 'main' already"):
            run(rank, "broken", goes_on=False)

    for action in (whole, broken, refused, resumed):
        assert in_ranks(2, action, tmp_path) == [0, 0]
    logs = [Store.open(tmp_path / name).log() for name in ("whole", "broken")]
    ids = [[c.id for c in log if c.metadata["timeline"]["name"] == "main"] for log in logs]
    assert ids[0] == ids[1]
    assert len(ids[0]) > 1


def test_another_run_in_a_used_store_is_refused(tmp_path: Path, base: Path) -> None:
    first = StoreCallback(tmp_path / "store", base=base)
    make_trainer(tmp_path / "run", make_model(), [first]).train()

    again = StoreCallback(tmp_path / "store", base=base)
    with pytest.raises(InvalidInputError, match=r"callback\.resume"):
        make_trainer(tmp_path / "run", make_model(), [again]).train()
    other = StoreCallback(tmp_path / "store", base=base, name="other")
    make_trainer(tmp_path / "run", make_model(), [other]).train()
    assert other.timeline.checkpoints()


def test_early_stopping_keeps_its_count_over_a_resume(tmp_path: Path, base: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_one_loss",
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 0.0,
    }
    whole = StoreCallback(tmp_path / "whole", base=base)
    trainer = make_trainer(tmp_path / "a", make_model(), [EarlyStoppingCallback(4)], **options)
    whole.attach(trainer)
    trainer.train()
    broken = StoreCallback(tmp_path / "broken", base=base)
    victim = make_trainer(
        tmp_path / "b", make_model(), [EarlyStoppingCallback(4), Watch(4)], **options
    )
    broken.attach(victim)
    with pytest.raises(KeyboardInterrupt):
        victim.train()

    again = StoreCallback(tmp_path / "broken", base=base)
    resumed = make_trainer(
        tmp_path / "b",
        make_model(),
        [EarlyStoppingCallback(4)],
        restore_callback_states_from_checkpoint=True,
        **options,
    )
    again.attach(resumed)
    resumed.train(resume_from_checkpoint=again.resume(tmp_path / "b"))

    assert resumed.state.global_step == trainer.state.global_step == 5


def test_load_best_model_at_end_gives_the_best(tmp_path: Path, base: Path) -> None:
    callback, watch = StoreCallback(tmp_path / "store", base=base), Watch()
    trainer = make_trainer(
        tmp_path / "run",
        make_model(),
        [callback, watch],
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="one_loss",
        learning_rate=0.05,
    )
    trainer.train()

    evaluated = [e for e in trainer.state.log_history if "eval_one_loss" in e]
    best = min(evaluated, key=lambda e: e["eval_one_loss"])["step"]
    assert same_bits(state_of(trainer.model), watch.seen[best])


def test_an_adapter_is_all_that_is_kept_of_a_model_with_one(tmp_path: Path) -> None:
    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(make_model(), config)

    def run(name: str, fail: int | None = None) -> tuple[Trainer, StoreCallback]:
        callback = StoreCallback(tmp_path / name, retention=KeepLast(9))
        callbacks: list[TrainerCallback] = [callback, *([Watch(fail)] if fail else [])]
        trainer = make_trainer(tmp_path / f"{name}-run", adapted(1 if fail else 2), callbacks)
        return trainer, callback

    whole, kept = run("whole", fail=99)
    whole.train()
    assert all(".lora_" in name for name in kept.store.load(kept.timeline.checkpoints()[-1]))

    broken, _ = run("broken", fail=5)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed, again = run("broken")
    resumed.train(resume_from_checkpoint=again.resume(tmp_path / "broken-run"))

    assert same_bits(state_of(resumed.model), state_of(whole.model))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_exported_adapter_is_configured_as_peft_does_it(
    tmp_path: Path, task: str | None
) -> None:
    make_model().save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type=task)
    model = get_peft_model(loaded, config)
    store = Store.create(tmp_path / "store")
    said = {"export": KeptModel(model).export_settings()}
    store.export(store.save(KeptModel(model).tensors(), metadata=said), tmp_path / "out")

    model.save_pretrained(tmp_path / "peft")
    for folder in ("out", "peft"):
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder)
        assert same_bits(state_of(found), state_of(model))
    ours, theirs = ((tmp_path / f / "adapter_config.json").read_text() for f in ("out", "peft"))
    assert ours == theirs


def test_trls_trainer_commits_too(tmp_path: Path) -> None:
    callback = StoreCallback(
        tmp_path / "store", base=EXAMPLE / "base", best={"eval_roman_loss": "min"}
    )
    args = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "bfloat16"},
    )
    trainer = SFTTrainer(
        model=str(EXAMPLE / "base"),
        args=args,
        train_dataset=rows("roman", "train", 8),
        eval_dataset={name: rows(name, "validation", 4) for name in ("roman", "status")},
        callbacks=[callback],
    )
    trainer.train()

    best = callback.best("eval_roman_loss")
    assert {"eval_roman_loss", "eval_status_loss"} <= best.metrics.keys()
    assert best.stored_bytes < 0.1 * best.logical_bytes
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def rows(name: str, split: str, count: int) -> Any:
    datasets = pytest.importorskip("datasets")
    path = str(EXAMPLE / "data" / f"{name}.{split}.jsonl")
    return datasets.Dataset.from_json(path).select(range(count))


def test_unsupported_settings_are_refused_at_the_beginning(tmp_path: Path, base: Path) -> None:
    options = {"save_strategy": "best", "metric_for_best_model": "eval_one_loss"}
    callback = StoreCallback(tmp_path / "store", base=base)
    with pytest.raises(InvalidInputError, match="save_strategy"):
        make_trainer(tmp_path / "run", make_model(), [callback], **options).train()
    with pytest.raises(InvalidInputError, match="before training"):
        _ = StoreCallback(tmp_path / "store").timeline
    assert Store.open(tmp_path / "store").log() == []
