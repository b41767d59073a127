"""Test unusual trainings with a StoreCallback: kills, errors, odd metrics, adapters."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

from msft_store import (
    BaseError,
    BusyError,
    Checkpoint,
    DiskBudget,
    InvalidInputError,
    KeepLast,
    OutOfSpaceError,
    OverBudgetError,
    Store,
    Timeline,
)
from msft_store.integrations.hf import StoreCallback
from msft_store.integrations.hf.trainer_checks import extract_metrics
from msft_store.storage.backend import LocalBackend
from msft_store.testing import WRITE_OPERATIONS, FaultyBackend
from tests.support.children import begin, end_of
from tests.support.states import same_bits
from tests.support.trainers import Watch, losses, make_model, make_trainer, state_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def points_of(store: Store) -> list[Checkpoint]:
    return [c for c in store.log() if c.metadata["timeline"]["name"] == "main-resume"]


def test_a_run_that_has_ended_is_not_trained_further(tmp_path: Path, base: Path) -> None:
    # Inside an epoch, the Trainer takes a step before it checks that training is complete.
    def run() -> tuple[Trainer, StoreCallback]:
        callback = StoreCallback(tmp_path / "store", base=base)
        trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=3)
        trainer.train(resume_from_checkpoint=callback.resume(tmp_path / "run"))
        return trainer, callback

    first, callback = run()
    ids = [c.id for c in callback.timeline.checkpoints()]
    again, other = run()

    assert again.state.global_step == first.state.global_step == 3
    assert same_bits(state_of(again.model), state_of(first.model))
    assert losses(again) == losses(first)
    assert [c.id for c in other.timeline.checkpoints()] == ids


def test_metrics_of_an_interrupted_evaluation_are_discarded(tmp_path: Path, base: Path) -> None:
    callback = StoreCallback(tmp_path / "store", base=base, retention=KeepLast(9))
    trainer = make_trainer(tmp_path / "run", make_model(), [callback, Watch(evaluated=6)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=callback.resume(tmp_path / "run"))

    kept = callback.timeline.checkpoints()
    assert [c.step for c in kept] == [3, 6, 9, 10]
    assert all(c.metrics.keys() == {"eval_one_loss", "eval_two_loss"} for c in kept)


def test_a_kill_at_any_moment_of_a_commit_changes_nothing(tmp_path: Path, base: Path) -> None:
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 1}

    class Killed(BaseException):
        def __init__(self, *told: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(name: str, fail_at: int | None = None) -> tuple[Trainer, StoreCallback, int]:
        path = tmp_path / name
        if not path.exists():
            Store.create(path)
        backend = FaultyBackend(LocalBackend(path), error=Killed, kinds=WRITE_OPERATIONS)
        backend.fail_at = fail_at
        callback = StoreCallback(Store(backend), base=base, retention=KeepLast(9))
        trainer = make_trainer(path / "run", make_model(), [callback], **options)
        trainer.train(resume_from_checkpoint=callback.resume(path / "run"))
        return trainer, callback, backend.count

    def killed(name: str, at: int) -> Callable[[], int]:
        def work() -> int:
            torch.set_num_threads(1)
            run(name, at)
            return 0

        return work

    whole, expected, operations = run("whole")
    for part in (0.4, 0.55, 0.7, 0.85):
        name = f"part-{part}"
        assert end_of(begin(killed(name, int(part * operations)))) == -signal.SIGKILL
        trainer, callback, _ = run(name)
        assert same_bits(state_of(trainer.model), state_of(whole.model))
        assert losses(trainer) == losses(whole)
        ids = [c.id for c in callback.timeline.checkpoints()]
        assert ids == [c.id for c in expected.timeline.checkpoints()]
        assert callback.store.check() == []


@pytest.mark.parametrize("is_complete", [True, False])
def test_resume_directories_of_killed_processes_are_deleted(
    tmp_path: Path, base: Path, is_complete: bool
) -> None:
    callback = StoreCallback(tmp_path / "store", base=base)
    make_trainer(tmp_path / "run", make_model(), [callback], max_steps=2, save_steps=1).train()

    def work() -> int:
        if not is_complete:
            # This process ends before it writes the first file into the directory.
            Path.write_text = lambda *arguments, **keywords: os._exit(0)
        StoreCallback(tmp_path / "store", base=base).resume(tmp_path / "run")
        return 0

    assert end_of(begin(work)) == 0
    (left,) = (tmp_path / "run").glob(".resume-*")
    folder = callback.resume(tmp_path / "run")

    assert folder is not None
    assert [str(path) for path in (tmp_path / "run").glob(".resume-*")] == [folder]
    assert str(left) != folder


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path: Path, base: Path) -> None:
    told, tell = os.pipe()
    wait, go_on = os.pipe()

    def train() -> tuple[StoreCallback, Trainer]:
        callback = StoreCallback(tmp_path / "store", base=base)
        trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=2)
        trainer.train(resume_from_checkpoint=callback.resume(tmp_path / "run"))
        return callback, trainer

    def work() -> int:
        os.close(go_on)
        running = train()
        os.write(tell, b"trained")
        os.read(wait, 1)
        return 0 if running else 1

    child = begin(work)
    os.close(tell)
    assert os.read(told, 10) == b"trained"
    ids = {c.id for c in Store.open(tmp_path / "store").log()}
    with pytest.raises(BusyError, match=f"timeline 'main' of .*process {child} on"):
        train()
    assert {c.id for c in Store.open(tmp_path / "store").log()} == ids
    os.close(go_on)
    assert end_of(child) == 0
    train()


def test_commits_in_the_background_are_those_of_the_foreground(tmp_path: Path, base: Path) -> None:
    ids = []
    for background in (False, True):
        folder = tmp_path / str(background)
        callback = StoreCallback(
            folder / "store", base=base, retention=KeepLast(9), background=background
        )
        make_trainer(folder / "run", make_model(), [callback], save_steps=1).train()
        ids.append([c.id for c in callback.timeline.checkpoints()])
        point = points_of(callback.store)
        assert [c.step for c in point] == [10]
        callback.close()
    assert ids[0] == ids[1]


def test_an_error_in_the_background_ends_the_training(tmp_path: Path, base: Path) -> None:
    callback = StoreCallback(
        tmp_path / "store", base=base, retention=DiskBudget(1000), background=True
    )
    trainer = make_trainer(tmp_path / "run", make_model(), [callback], save_steps=1)
    with pytest.raises(OverBudgetError):
        trainer.train()
    assert trainer.state.global_step < 10


def test_without_a_finite_metric_no_best_is_restored(tmp_path: Path, base: Path) -> None:
    callback, watch = StoreCallback(tmp_path / "store", base=base), Watch()
    trainer = make_trainer(
        tmp_path / "run",
        make_model(),
        [callback, watch],
        load_best_model_at_end=True,
        metric_for_best_model="one_loss",
        learning_rate=1e38,
        max_grad_norm=0,
        max_steps=3,
    )
    with pytest.warns(UserWarning, match="eval_one_loss"):
        trainer.train()
    assert same_bits(state_of(trainer.model), watch.seen[3])


def test_an_unknown_direction_is_refused(tmp_path: Path, base: Path) -> None:
    def accuracy(evaluated: Any) -> dict[str, float]:
        return {"accuracy": float(next(scores))}

    scores = iter([0.1, 0.1, 0.9, 0.1, 0.3, 0.1])
    options = {"metric_for_best_model": "one_accuracy", "greater_is_better": True}
    callback = StoreCallback(tmp_path / "store", base=base, retention=KeepLast(9))
    trainer = make_trainer(
        tmp_path / "run",
        make_model(),
        [callback],
        max_steps=3,
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        **options,
    )
    trainer.compute_metrics = accuracy
    trainer.train()

    assert callback.best("eval_one_accuracy").step == 2
    reader = StoreCallback(tmp_path / "store")
    assert reader.best("eval_one_accuracy", "max").step == 2
    with pytest.raises(InvalidInputError, match="'max'"):
        reader.best("eval_one_accuracy")


def test_metrics_with_the_same_name_for_all_datasets_get_their_own() -> None:
    metrics = {"eval_one_loss": 1.0, "eval_one_runtime": 3.0, "eval_entropy": 2.0}
    counters = {"eval_num_tokens": 7, "epoch": 1.0, "eval_one_samples_per_second": 4.0}
    assert extract_metrics({**metrics, **counters}) == {
        "eval_one_loss": 1.0,
        "eval_entropy": 2.0,
        "eval_one_entropy": 2.0,
    }
    assert extract_metrics({"eval_loss": 1.0, "eval_runtime": 3.0}) == {"eval_loss": 1.0}


@pytest.mark.parametrize(
    "name", ["response_time", "f1_per_epoch", "tokens_per_second_of_speech", "own_runtime", "epoch"]
)
def test_a_metric_is_kept_however_it_is_called(tmp_path: Path, base: Path, name: str) -> None:
    scores = iter([0.1, 0.5, 0.9, 0.2, 0.1, 0.4])  # of the sets "one" and "two" in turn
    callback, watch = StoreCallback(tmp_path / "store", base=base), Watch()
    trainer = make_trainer(
        tmp_path / "run",
        make_model(),
        [callback, watch],
        max_steps=3,
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"two_{name}",
    )
    trainer.compute_metrics = lambda _: {name: next(scores)}
    trainer.train()

    best = callback.best(f"eval_two_{name}", "max")
    assert (best.step, best.metrics[f"eval_two_{name}"]) == (1, 0.5)
    assert best.metrics.keys() == {
        f"eval_{part}_{metric}" for part in ("one", "two") for metric in ("loss", name)
    }
    assert same_bits(state_of(trainer.model), watch.seen[1])


def test_a_counter_that_is_asked_for_is_kept() -> None:
    evaluation = {"eval_loss": 1.0, "eval_runtime": 3.0, "eval_num_tokens": 7.0}
    assert extract_metrics(evaluation, {"eval_runtime"}) == {"eval_loss": 1.0, "eval_runtime": 3.0}


class Asks(TrainerCallback):
    """Requests a save after each evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = True


def test_saves_that_other_callbacks_ask_for_are_commits(tmp_path: Path, base: Path) -> None:
    options = {"max_steps": 2, "eval_steps": 1, "save_strategy": "no"}
    before = StoreCallback(tmp_path / "before", base=base)
    make_trainer(tmp_path / "a", make_model(), [Asks(), before], **options).train()
    assert list((tmp_path / "a").glob("checkpoint-*")) == []

    after = StoreCallback(tmp_path / "after", base=base)
    with pytest.warns(UserWarning, match="before StoreCallback"):
        make_trainer(tmp_path / "b", make_model(), [after, Asks()], **options).train()
    assert after.timeline.checkpoints()[-1].step == 2


def test_callbacks_whose_state_would_be_lost_are_named(tmp_path: Path, base: Path) -> None:
    options = {
        "max_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "one_loss",
    }
    callback = StoreCallback(tmp_path / "store", base=base)
    others: list[TrainerCallback] = [EarlyStoppingCallback(3)]
    trainer = make_trainer(tmp_path / "run", make_model(), [callback, *others], **options)
    with pytest.warns(UserWarning, match="EarlyStoppingCallback would lose its state"):
        # Another loop than the Trainer's calls the callbacks.
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)

    attached = StoreCallback(tmp_path / "attached", base=base)
    trainer = make_trainer(tmp_path / "run", make_model(), [attached, *others], **options)
    assert attached.attach(trainer) is attached
    assert trainer.callback_handler.callbacks.count(attached) == 1


def test_a_reserved_run_name_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InvalidInputError, match="main-resume"):
        StoreCallback(tmp_path / "store", base=base, name="main-resume")


def test_a_resume_point_is_exported_as_a_model(tmp_path: Path, base: Path) -> None:
    callback = StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=2)
    trainer.train()
    (point,) = points_of(callback.store)
    callback.store.export(point, tmp_path / "model")

    model, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, output_loading_info=True
    )
    assert same_bits(state_of(model), state_of(trainer.model))
    assert not told["unexpected_keys"]


def test_an_adapter_is_exported_as_one(tmp_path: Path, base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    callback = StoreCallback(tmp_path / "store")
    # Training changes the active adapter, whatever its name.
    model: PeftModel = get_peft_model(plain, config, adapter_name="mine")
    make_trainer(tmp_path / "run", model, [callback], max_steps=2).train()

    for name, checkpoint in (
        ("commit", callback.timeline.checkpoints()[-1]),
        ("point", points_of(callback.store)[0]),
    ):
        callback.store.export(checkpoint, tmp_path / name)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert same_bits(state_of(loaded), state_of(model))


def test_learned_prompts_are_restored_too(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    callback = StoreCallback(tmp_path / "store", retention=KeepLast(9))
    watch = Watch()
    model = get_peft_model(make_model(), config)
    trainer = make_trainer(
        tmp_path / "run", model, [callback, watch], max_steps=2, eval_steps=1, learning_rate=0.1
    )
    trainer.train()
    first = callback.timeline.checkpoints()[0]
    assert not same_bits(state_of(trainer.model), watch.seen[1])

    callback.restore(trainer.model, first)
    assert same_bits(state_of(trainer.model), watch.seen[1])


def test_a_run_that_ended_before_its_first_resume_point_begins_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> tuple[Trainer, StoreCallback]:
        callback = StoreCallback(tmp_path / name, base=base)
        trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=4)
        trainer.train(resume_from_checkpoint=callback.resume(tmp_path / "run"))
        return trainer, callback

    whole, callback = run("whole")
    ids = [c.id for c in callback.timeline.checkpoints()]
    commit, calls = Timeline.commit, []

    def failing(self: Timeline, *arguments: Any, **named: Any) -> Checkpoint:
        calls.append(self.name)
        if self.name == "main-resume":
            raise OutOfSpaceError("the disk is full")
        return commit(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Timeline, "commit", failing)
        with pytest.raises(OutOfSpaceError):
            run("ended")
    assert calls == ["main", "main-resume"]
    # A training that did not call resume gets an error, because the run exists.
    other = StoreCallback(tmp_path / "ended", base=base)
    with pytest.raises(InvalidInputError, match="has a run 'main' already"):
        make_trainer(tmp_path / "run", make_model(), [other], max_steps=4).train()
    again, callback = run("ended")
    assert same_bits(state_of(again.model), state_of(whole.model))
    assert [c.id for c in callback.timeline.checkpoints()] == ids


def test_an_unknown_metric_gives_a_warning(tmp_path: Path, base: Path) -> None:
    best = {"eval_one_los": "min", "eval_two_loss": "min"}
    callback = StoreCallback(tmp_path / "store", base=base, best=best)  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=4)
    with pytest.warns(
        UserWarning, match="'eval_one_los', so its best .* the nearest is 'eval_one_loss'"
    ) as found:
        trainer.train()
    assert sum("no evaluation gives" in str(warning.message) for warning in found) == 1


def test_a_base_may_be_an_id_of_the_hub_that_is_in_the_cache(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "cache" / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, model / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    callback = StoreCallback(tmp_path / "store", base="some/model")

    assert callback.base is not None
    assert callback.base.id == Store.open(tmp_path / "store").add_base(base).id
    with pytest.raises(BaseError, match="not in the cache"):
        StoreCallback(tmp_path / "store", base="some/other")


def test_weights_of_a_part_named_trainer_are_in_the_resume_folder_and_exports(
    tmp_path: Path, base: Path
) -> None:
    def make() -> Any:
        model = make_model()
        model.trainer = torch.nn.Linear(2, 2)
        model.extra = torch.compile(torch.nn.Linear(2, 2), backend="eager")
        return model

    callback = StoreCallback(tmp_path / "store", base=base, background=True)
    model = make()
    make_trainer(tmp_path / "run", model, [callback], max_steps=3).train()
    names = {name.replace("._orig_mod", "") for name in model.state_dict()}
    point = next(c for c in callback.store.log() if "without" in c.metadata.get("export", {}))
    (file,) = (f for f in callback.store.export(point, tmp_path / "out") if f.suffix != ".json")
    assert load_file(file).keys() == names - {"lm_head.weight"}

    again = StoreCallback(tmp_path / "store", base=base)
    folder = again.resume(tmp_path / "run")
    assert folder is not None
    assert load_file(Path(folder) / "model.safetensors").keys() == names
    resumed = make()
    with torch.no_grad():
        resumed.trainer.weight.fill_(3)
        resumed.extra.weight.fill_(3)
    make_trainer(tmp_path / "run", resumed, [again], max_steps=4).train(
        resume_from_checkpoint=folder
    )
    assert torch.equal(resumed.trainer.weight, model.trainer.weight)
    assert torch.equal(resumed.extra.weight, model.extra.weight)


class Scaled(torch.nn.Module):
    """A part of a model with extra state that is no tensor."""

    scale = 1.0

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


class Counts(TrainerCallback):
    """Raise the scale after each step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].fp8.scale += 1.0


def test_extra_state_of_a_model_comes_back(tmp_path: Path, base: Path) -> None:
    def run(steps: int) -> tuple[Any, StoreCallback]:
        model: Any = make_model()
        model.fp8 = Scaled()
        callback = StoreCallback(tmp_path / "store", base=base, retention=KeepLast(9))
        trainer = make_trainer(tmp_path / "run", model, [Counts(), callback], max_steps=steps)
        trainer.train(resume_from_checkpoint=callback.resume(tmp_path / "run"))
        return model, callback

    run(2)
    model, callback = run(4)
    assert model.fp8.scale == 5.0
    for checkpoint in callback.timeline.checkpoints():
        callback.restore(model, checkpoint)
        assert model.fp8.scale == 1.0 + (checkpoint.step or 0)


def test_an_offloaded_model_is_refused_when_training_begins(tmp_path: Path, base: Path) -> None:
    model: Any = make_model()
    model.spare = torch.nn.Linear(2, 2, device="meta")
    callback = StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(tmp_path / "run", make_model(), [callback])
    trainer.callback_handler.model = model
    with pytest.raises(InvalidInputError, match=r"'spare\.weight'.*offloaded"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


def test_an_optimizer_that_cannot_be_kept_is_refused_after_one_step(
    tmp_path: Path, base: Path
) -> None:
    class Strange(torch.optim.SGD):
        def state_dict(self) -> Any:
            state = super().state_dict()
            return {**state, "plan": object() if self.state else None}

    model, callback = make_model(), StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(tmp_path / "run", model, [callback], save_steps=3, max_steps=3)
    trainer.optimizer = Strange(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(InvalidInputError, match=r"optimizer\.plan is a object"):
        trainer.train()
    assert trainer.state.global_step == 1
