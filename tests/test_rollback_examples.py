"""The examples of other rollback algorithms run on real training and work as documented."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from msft_store import Checkpoint, KeepLast, MismatchError, Store, Timeline, UnknownCheckpointError
from tests.support.states import same_bits

FOLDER = Path(__file__).parent.parent / "examples" / "rollback"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "task")


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    torch.set_num_threads(1)
    yield
    for name in (*NAMES, "task"):
        sys.modules.pop(name, None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_every_example_is_short_and_on_the_page() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NAMES) == 5
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert 30 <= len(text.splitlines()) <= 120, name
        assert f"`{name}.py`" in page


@pytest.mark.parametrize("name", NAMES)
def test_every_example_prints_what_its_page_shows(name: str) -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        # More threads wait for each other where other tests run beside these.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = page.partition(f"## `{name}.py`")[2].partition("```\n")[2].partition("```")[0]
    # Losses may differ in their last digit from one kind of processor to another.
    assert [words(line) for line in done.stdout.splitlines()] == [
        words(line) for line in shown.splitlines()
    ]


def words(line: str) -> list[str]:
    return [word for word in line.split() if not any(char.isdigit() for char in word)]


def test_after_a_spike_training_is_that_of_a_run_without_its_batches(store: Store) -> None:
    import loss_spike_guard as guard  # noqa: PLC0415

    said: list[str] = []
    model, taken = guard.train(store, guard.task.corrupted, steps=14, report=said.append)
    clean = guard.task.load_model()
    optimizer = guard.task.make_optimizer(clean)
    for position in taken:
        guard.task.train_step(clean, optimizer, guard.task.batch(position))

    assert said
    assert not {13, 14} & set(taken)
    assert len(taken) == 14
    assert same_bits(weights(model), weights(clean))


def test_a_guard_gives_up_when_it_is_not_the_batches(store: Store) -> None:
    import loss_spike_guard as guard  # noqa: PLC0415

    def hopeless(position: int) -> Any:
        return guard.task.corrupted(13) if position > 6 else guard.task.batch(position)

    with pytest.raises(guard.LossSpikeError, match="after 2 roll-backs"):
        guard.train(store, hopeless, steps=20, skip=2, at_most=2, report=lambda line: None)
    assert store.check() == []


def test_a_spike_of_the_gradients_alone_is_one(store: Store, monkeypatch: Any) -> None:
    import loss_spike_guard as guard  # noqa: PLC0415

    said: list[str] = []
    step, positions = guard.task.train_step, []

    def batches(position: int) -> Any:
        positions.append(position)
        return guard.task.batch(position)

    def steep(model: Any, optimizer: Any, data: Any) -> dict[str, float]:
        found: dict[str, float] = step(model, optimizer, data)
        return {
            **found,
            "gradient norm": found["gradient norm"] * (100 if positions[-1] == 5 else 1),
        }

    monkeypatch.setattr(guard.task, "train_step", steep)
    _, taken = guard.train(store, batches, steps=6, skip=2, report=said.append)

    (line,) = said
    assert "position 5: gradient norm" in line
    assert "back to step 0, skipping positions 0 to 5" in line
    assert taken == [6, 7, 8, 9, 10, 11]


def test_early_stopping_ends_with_the_best_of_every_metric(store: Store) -> None:
    import early_stopping  # noqa: PLC0415

    model, best = early_stopping.train(
        store, tasks=("entity",), lr=1e-4, every=3, patience=2, most=9, report=lambda line: None
    )

    assert same_bits(store.load("best/overall"), weights(model))
    for metric, checkpoint in best.items():
        assert store.get(f"best/{metric}").id == checkpoint.id
    metrics = early_stopping.task.evaluate_all(model, ("entity",))
    assert metrics == best["overall"].metrics


def test_a_pin_keeps_a_winner_that_is_being_cloned(store: Store) -> None:
    import population  # noqa: PLC0415

    base = store.add_base(population.task.BASE)
    one, two = (
        population.Member(
            name=name, lr=1e-5, timeline=Timeline(store, base, retention=KeepLast(1), name=name)
        )
        for name in ("one", "two")
    )
    one.train(2)
    winner = one.commit()
    expected = weights(one.model)
    two.go_on(1)

    population.exploit(store, two, winner, lambda: one.go_on(1))

    assert same_bits(weights(two.model), expected)
    assert (two.steps, two.lr) == (2, 1e-5)
    assert winner.id in {checkpoint.id for checkpoint in two.timeline.checkpoints()}
    assert store.check() == []
    # Without a pin, the same is the end of the winner.
    winner = one.timeline.checkpoints()[-1]
    one.go_on(1)
    with pytest.raises(UnknownCheckpointError):
        two.timeline.rollback(winner, into=two.model)


def test_a_mean_is_that_of_the_whole_tensors(store: Store) -> None:
    import averaging  # noqa: PLC0415

    model = averaging.task.load_model()
    with averaging.train(store, tasks=("entity",), lr=1e-4, commits=3, every=1) as timeline:
        averaging.lawa(store, timeline, model, 2)
        states = [store.load(checkpoint) for checkpoint in timeline.checkpoints()[-2:]]
    for name, tensor in weights(model).items():
        mean = sum(state[name].float() for state in states) / 2
        assert torch.equal(tensor, mean.to(tensor.dtype))


def test_a_soup_is_never_worse_than_the_best(store: Store) -> None:
    import averaging  # noqa: PLC0415

    model = averaging.task.load_model()

    def evaluate(model: Any) -> float:
        return float(averaging.task.evaluate(model, "entity"))

    with averaging.train(store, tasks=("entity",), lr=1e-4, commits=4, every=2) as timeline:
        kept = timeline.checkpoints()
        averaging.greedy_soup(store, kept, model, evaluate)
    assert evaluate(model) <= min(checkpoint.metrics["entity"] for checkpoint in kept)


def test_checkpoints_of_different_models_have_no_mean(store: Store) -> None:
    import averaging  # noqa: PLC0415

    one = store.save({"a": torch.ones(3)})
    other = store.save({"a": torch.ones(4)})

    with pytest.raises(MismatchError, match="'a'"):
        averaging.average_into(torch.nn.Linear(1, 1), store, [one, other])


def test_a_merge_of_forks_is_the_anchor_and_the_shares_of_what_they_learned(store: Store) -> None:
    import fork_merge  # noqa: PLC0415

    states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}]
    states.append({"w": torch.tensor([1.0, 6.0])})
    anchor, *forks = (store.save(state) for state in states)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(2))

    fork_merge.merge_into(model, store, anchor, forks, (0.5, 0.25))

    assert model.w.tolist() == [2.0, 3.0]


def test_forks_go_back_to_each_new_anchor(store: Store) -> None:
    import fork_merge  # noqa: PLC0415

    said: list[str] = []
    last: Checkpoint = fork_merge.train(
        store, "roman", ("status",), rounds=2, steps=1, report=said.append
    )

    assert len(said) == 2
    assert last.step == 2
    assert store.check() == []
