"""Test options of a Trainer with a StoreCallback, further trainings, and other callbacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.integrations
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from msft_store import InvalidInputError
from msft_store.integrations.hf import StoreCallback
from tests.support.states import same_bits
from tests.support.trainers import Watch, losses, make_model, make_trainer, state_of

EACH_STEP = {"eval_steps": 1, "save_steps": 1}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


class OutOfMemory(TrainerCallback):
    """Fails once at the beginning of a step, as CUDA does."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


class Records(TrainerCallback):
    """Records the steps of saves, and the weights at the end of training."""

    def __init__(self) -> None:
        self.saves: list[int] = []
        self.last: Any = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["model"] is not None
        self.saves.append(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = state_of(kwargs["model"])


@pytest.mark.parametrize(
    ("limit", "best", "steps"),
    [(3, 2, [2, 4, 5]), (3, 4, [3, 4, 5]), (2, 1, [1, 5]), (1, 2, [2]), (1, 5, [5])],
)
def test_the_best_is_one_of_save_total_limit(
    tmp_path: Path, base: Path, limit: int, best: int, steps: list[int]
) -> None:
    kept = []
    for name in ("ours", "theirs"):
        scores = iter([step == best for step in range(1, 6) for _ in ("one", "two")])
        callback = StoreCallback(tmp_path / name, base=base)
        trainer = make_trainer(
            tmp_path / f"{name}-run",
            make_model(),
            [callback] if name == "ours" else [],
            max_steps=5,
            save_total_limit=limit,
            metric_for_best_model="two_score",
            load_best_model_at_end=True,
            **EACH_STEP,
        )
        trainer.compute_metrics = lambda _, scores=scores: {"score": float(next(scores))}
        trainer.train()
        found = (tmp_path / f"{name}-run").glob("checkpoint-*")
        kept.append(sorted(int(path.name.removeprefix("checkpoint-")) for path in found))
        if name == "ours":
            kept[0] = [c.step for c in callback.timeline.checkpoints()]
    assert kept == [steps, steps]


def test_save_only_model_keeps_no_resume_point(tmp_path: Path, base: Path) -> None:
    callback = StoreCallback(tmp_path / "store", base=base)
    options = {"max_steps": 2, "save_only_model": True, **EACH_STEP}
    make_trainer(tmp_path / "run", make_model(), [callback], **options).train()

    assert callback.resume(tmp_path / "run") is None
    assert not any("exp_avg" in n for c in callback.store.log() for n in callback.store.tensors(c))
    again = StoreCallback(tmp_path / "store", base=base)
    with pytest.raises(InvalidInputError, match="already: give another name"):
        make_trainer(tmp_path / "run", make_model(), [again], **options).train()


def test_options_without_effect_are_named_once(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda *_: None)
    callback = StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(
        tmp_path / "run",
        make_model(),
        [callback, OutOfMemory(1)],
        max_steps=2,
        push_to_hub=True,
        hub_strategy="checkpoint",
        save_on_each_node=True,
        auto_find_batch_size=True,
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in found if "msft_store" in w.filename]
    assert [text.split()[0] for text in said] == ["push_to_hub", "save_on_each_node"]
    assert "trainer.push_to_hub()" in said[0]


def test_other_callbacks_see_the_saves_and_the_best_weights(tmp_path: Path, base: Path) -> None:
    seen = []
    for ours in (False, True):
        before, after, watch = Records(), Records(), Watch()
        callback = StoreCallback(tmp_path / "store", base=base)
        trainer = make_trainer(
            tmp_path / str(ours),
            make_model(),
            [before, *([callback] if ours else []), after, watch],
            max_steps=5,
            eval_steps=2,
            save_steps=2,
            learning_rate=0.05,
            load_best_model_at_end=True,
            metric_for_best_model="one_loss",
        )
        trainer.train()
        assert before.saves == after.saves
        assert same_bits(before.last, after.last)
        assert same_bits(after.last, state_of(trainer.model))
        seen.append(before)
    assert seen[0].saves == seen[1].saves
    assert same_bits(seen[0].last, seen[1].last)


def test_states_of_callbacks_of_one_class_are_kept_apart(tmp_path: Path, base: Path) -> None:
    options = {
        "max_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "one_loss",
        "restore_callback_states_from_checkpoint": True,
        **EACH_STEP,
    }

    def run(fail: int | None) -> tuple[Trainer, list[EarlyStoppingCallback]]:
        stops = [EarlyStoppingCallback(9, 0.0), EarlyStoppingCallback(9, 100.0)]
        callback = StoreCallback(tmp_path / "store", base=base)
        watch = [Watch(fail)] if fail else []
        trainer = make_trainer(
            tmp_path / "run", make_model(), [callback, *stops, *watch], **options
        )
        try:
            trainer.train(resume_from_checkpoint=callback.resume(tmp_path / "run"))
        except KeyboardInterrupt:
            assert fail
        found = [
            c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)
        ]
        return trainer, found

    run(4)
    _, stops = run(None)
    assert [stop.early_stopping_threshold for stop in stops] == [0.0, 100.0]
    assert stops[1].early_stopping_patience_counter == 3


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_smaller_batch_begins_the_run_again(tmp_path: Path, base: Path, step: int) -> None:
    def run(name: str, callbacks: list[TrainerCallback]) -> tuple[Trainer, int]:
        folder = tmp_path / name
        trainer = make_trainer(
            folder,
            make_model(),
            [*callbacks, OutOfMemory(step)],
            max_steps=4,
            per_device_train_batch_size=4,
            auto_find_batch_size=True,
            **EACH_STEP,
        )
        trainer.train()
        return trainer, trainer.state.train_batch_size

    callback = StoreCallback(tmp_path / "store", base=base)
    ours, theirs = run("ours", [callback]), run("theirs", [])
    assert ours[1] == theirs[1] < 4
    assert losses(ours[0]) == losses(theirs[0])
    assert same_bits(state_of(ours[0].model), state_of(theirs[0].model))
    assert callback.name == "main"
    assert [c.step for c in callback.timeline.checkpoints()] == [4]
    assert callback.store.check() == []


@pytest.mark.parametrize("step", [2, 4])
def test_a_smaller_batch_begins_again_from_the_resume_point(
    tmp_path: Path, base: Path, step: int
) -> None:
    def run(name: str, fault: TrainerCallback, size: int) -> tuple[Trainer, StoreCallback]:
        callback = StoreCallback(tmp_path / name, base=base)
        trainer = make_trainer(
            tmp_path / f"{name}-run",
            make_model(),
            [callback, fault],
            max_steps=6,
            per_device_train_batch_size=size,
            auto_find_batch_size=True,
            eval_steps=2,
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=callback.resume(tmp_path / f"{name}-run"))
        return trainer, callback

    for name in ("whole", "cut"):
        with pytest.raises(KeyboardInterrupt):
            run(name, Watch(3), 4)
    whole, _ = run("whole", OutOfMemory(2), 4)
    trainer, callback = run("cut", OutOfMemory(step), 4)
    assert trainer.state.global_step == 6
    assert trainer._train_batch_size < 4
    assert losses(trainer) == losses(whole)
    assert same_bits(state_of(trainer.model), state_of(whole.model))
    assert not list((tmp_path / "cut-run").glob(".resume-*"))
    assert len(callback.store.log()) == 2
    assert not [ref for ref in callback.store.refs() if not ref.startswith("timelines/")]
    assert callback.store.check() == []


def test_every_further_training_is_a_run_of_its_own(tmp_path: Path, base: Path) -> None:
    callback = StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=2, **EACH_STEP)
    ends = []
    for name in ("main", "main-2", "main-3"):
        trainer.train()
        assert callback.name == name
        ends.append(state_of(trainer.model))
    for name, end in zip(("main", "main-2", "main-3"), ends, strict=True):
        reader = StoreCallback(tmp_path / "store", name=name)
        model = make_model(9)
        reader.restore(model, reader.best("eval_one_loss"))
        assert same_bits(state_of(model), end)
    callback.close()
    assert callback.store.refs() == {}


def test_each_trial_of_a_search_is_a_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=2, **EACH_STEP)
    monkeypatch.setattr(transformers.integrations, "hp_params", dict)
    monkeypatch.setattr(trainer, "_report_to_hp_search", lambda *_: None)
    monkeypatch.setattr(trainer, "call_model_init", lambda trial: make_model())
    trainer.model_init = make_model

    class Trial(dict[str, float]):
        number = 0

        @property
        def params(self) -> dict[str, float]:
            return dict(self)

    # What hyperparameter_search does for each trial.
    trainer.hp_search_backend, trainer.hp_name = "optuna", None
    trainer.hp_space = dict
    for number, rate in enumerate((1e-3, 1e-2)):
        trial = Trial(learning_rate=rate)
        trial.number = number
        trainer.train(trial=trial)
        assert callback.name == f"main-run-{number}"
    trainer.hp_search_backend = None
    trainer.train()
    assert callback.name == "main"
    for name in ("main-run-0", "main-run-1", "main"):
        reader = StoreCallback(tmp_path / "store", name=name)
        assert reader.best("eval_one_loss").step == 2


def test_each_trial_of_a_search_with_optuna_is_a_run(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("optuna")
    callback = StoreCallback(tmp_path / "store", base=base)
    trainer = make_trainer(tmp_path / "run", make_model(), [callback], max_steps=2, **EACH_STEP)
    trainer.model_init = lambda _=None: make_model()
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        compute_objective=lambda metrics: metrics["eval_one_loss"],
        backend="optuna",
        n_trials=2,
    )
    for name in ("main-run-0", "main-run-1"):
        point = StoreCallback(tmp_path / "store", name=name).best("eval_one_loss")
        assert point.step in {1, 2}
    assert callback.name == "main-run-1"
    assert best.run_id in {"0", "1"}


def test_a_stream_that_ends_early_gives_the_batches_of_the_trainers_checkpoints(
    tmp_path: Path, base: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    ended = []
    for name in ("ours", "theirs"):
        callback = StoreCallback(tmp_path / name, base=base)
        for fail_after in (7, None):
            callbacks = [*([callback] if name == "ours" else []), Watch(fail_after)]
            trainer = make_trainer(
                tmp_path / f"{name}-run",
                make_model(),
                callbacks,
                max_steps=8,
                save_steps=4,
                eval_strategy="no",
            )
            trainer.train_dataset = datasets.IterableDataset.from_generator(_five_batches)
            if fail_after:
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
                last = tmp_path / f"{name}-run" / "checkpoint-4"
                point = callback.resume(tmp_path / "again") if name == "ours" else last
            else:
                trainer.train(resume_from_checkpoint=str(point))
        ended.append((losses(trainer), state_of(trainer.model)))
    assert ended[0][0] == ended[1][0]
    assert [step for step, _ in ended[0][0]] == list(range(1, 9))
    assert same_bits(ended[0][1], ended[1][1])


def _five_batches() -> Iterator[dict[str, list[int]]]:
    for row in range(10):
        tokens = list(range(row, row + 8))
        yield {"input_ids": tokens, "labels": tokens}
