"""Commit, roll back, evict: a rollback algorithm's view, on recorded metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from msft_store import (
    Base,
    BusyError,
    Candidate,
    Champions,
    Checkpoint,
    DiskBudget,
    InvalidInputError,
    KeepBest,
    KeepLast,
    OverBudgetError,
    PeakWindow,
    PinnedError,
    Policy,
    Reason,
    Store,
    Timeline,
)
from msft_store.objects.chunks import ChunkStore
from msft_store.storage.backend import LocalBackend
from tests.support.states import State, bits_of, make_state, same_bits, train_step, write_base


def commit_all(
    line: Timeline, state: State, *scores: float, metric: str = "m", seed: int = 0
) -> list[tuple[Checkpoint, State]]:
    """Commit one checkpoint a score; return them with their states."""
    done = []
    for number, score in enumerate(scores):
        state = train_step(state, 0.02, seed + number)
        ckpt = line.commit(state, step=seed + number, metrics={metric: score})
        done.append((ckpt, state))
    return done


def checkpoint_ids(store: Store) -> set[str]:
    return {ckpt.id for ckpt in store.log()}


@pytest.mark.parametrize(
    ("policy", "scores", "expected"),
    [
        (KeepLast(2), (1, 2, 3, 4), {2, 3}),
        (Champions({"m": "max"}), (1, 5, 2, 5), {1}),
        (Champions({"m": "min"}) | KeepLast(1), (3, 1, 2), {1, 2}),
        (KeepBest("m", 2), (1, 4, 2, 3), {1, 3}),
        (KeepBest("m", 2) | DiskBudget(1 << 20), (1, 4, 2, 3), {1, 3}),
        (PeakWindow({"m": "max"}, 2), (1, 5, 2, 1), {1}),
    ],
)
def test_checkpoints_that_no_rule_keeps_are_evicted_at_once(
    *,
    store: Store,
    base: Base,
    state: State,
    policy: Policy,
    scores: tuple[float, ...],
    expected: set[int],
) -> None:
    line = Timeline(store, base, retention=policy)
    done = commit_all(line, state, *scores)
    want = {done[i][0].id for i in expected}
    assert checkpoint_ids(store) == want == set(line.kept())
    assert all(line.kept().values())
    for i in expected:
        assert same_bits(store.load(done[i][0]), done[i][1])
    assert store.check() == []


def test_a_peak_window_keeps_few_besides_root_and_best(store: Store, base: Base) -> None:
    window, names = 2, "abcdef"
    modes = dict.fromkeys(names, "max")
    state = make_state()
    line = Timeline(store, base, retention=PeakWindow(modes, window) | KeepBest("all"))
    for step in range(10):
        state = train_step(state, 0.01, step)
        metrics = {n: -abs(step - 1 - i) + 0.0 for i, n in enumerate(names)}
        ckpt = line.commit(state, step=step, metrics={**metrics, "all": float(step == 3)})
        best = {i for i, reasons in line.kept().items() if any("all" in r for r in reasons)}
        assert len(set(line.kept()) - best) <= window + 1
    assert line.last_commit is not None
    assert line.last_commit.checkpoint == ckpt
    assert any("roll-back is next" in r for reasons in line.kept().values() for r in reasons)


def test_a_rollback_restores_exactly_and_begins_a_branch(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=Champions({"m": "max"}) | KeepBest("m"))
    assert (line.root, line.branch) == (base, 0)
    done = commit_all(line, state, 1, 9, 3)
    best, expected = done[1]
    assert same_bits(line.rollback(best), expected)
    assert line.root == store.get(best.id)
    assert line.branch == 1
    assert checkpoint_ids(store) == {best.id}
    assert "root of the branch" in line.kept()[best.id]
    later = commit_all(line, expected, 2, 4, seed=10)
    assert later[0][0].parent == best.id
    # The root is a candidate of its branch, and still its champion.
    assert checkpoint_ids(store) == {best.id}
    new = commit_all(line, expected, 10, seed=20)[0][0]
    assert checkpoint_ids(store) == {best.id, new.id}
    line.rollback(new)
    assert checkpoint_ids(store) == {new.id}
    assert store.check() == []


def test_a_rollback_fills_a_module_in_place(store: Store) -> None:
    module = torch.nn.Linear(6, 4)
    line = Timeline(store, None, retention=KeepLast(3))
    ckpt = line.commit(module, step=1)
    before, place = bits_of(module.weight), module.weight.data_ptr()
    with torch.no_grad():
        module.weight.add_(1)
    assert line.rollback(ckpt, into=module) == {}
    assert (bits_of(module.weight), module.weight.data_ptr()) == (before, place)


def test_the_best_of_all_branches_survives_roll_backs(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=Champions({"m": "max"}) | KeepBest("overall"))
    first = line.commit(train_step(state, 0.1, 1), metrics={"m": 1.0, "overall": 9.0})
    second = line.commit(train_step(state, 0.1, 2), metrics={"m": 5.0, "overall": 1.0})
    line.rollback(second)
    line.commit(train_step(state, 0.1, 3), metrics={"m": 6.0, "overall": 2.0})
    assert {first.id, second.id} < checkpoint_ids(store)
    assert line.kept()[first.id] == ("best overall (9)",)


def test_the_best_overall_does_not_keep_an_old_root_alive(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=Champions({"m": "max"}) | KeepBest("overall"))
    line.rollback(line.commit(train_step(state, 0.3, 1), metrics={"m": 1.0, "overall": 0.0}))
    root_state = line.rollback(line.root)
    best_state = train_step(root_state, 0.02, 2)
    best = line.commit(best_state, metrics={"m": 1.0, "overall": 9.0})
    later = line.commit(train_step(root_state, 0.02, 3), metrics={"m": 2.0, "overall": 1.0})
    line.rollback(later)
    assert checkpoint_ids(store) == {best.id, later.id}
    assert store.stats().held_bytes == 0
    assert same_bits(store.load(best), best_state)
    assert store.check() == []


def test_a_root_is_an_anchor(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(1))
    for _ in range(3):
        done = commit_all(line, state, 1, 2)
        line.rollback(done[-1][0])
        state = done[-1][1]
    root = line.root
    assert isinstance(root, Checkpoint)
    objects = ChunkStore(LocalBackend(Path(store.path)))
    objects.refresh()
    keys = [k for e in store.tensors(root).values() for p in e.pieces for k in p.keys]
    found = [objects.find(key, root.base) for key in keys]
    assert max(stored.record.depth for stored in found if stored is not None) <= 1
    assert store.plan_gc(KeepLast(1)).held_bytes == 0


def test_a_rollback_to_nothing_known_changes_nothing(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=KeepLast(2))
    done = commit_all(line, state, 1, 2)
    with pytest.raises(Exception, match="no checkpoint"):
        line.rollback("feedfeedfeed")
    with pytest.raises(Exception, match="does not match"):
        line.rollback(done[0][0], into=torch.nn.Linear(2, 2))
    assert (line.root, line.branch) == (base, 0)
    assert checkpoint_ids(store) == {ckpt.id for ckpt, _ in done}


def test_the_checkpoints_of_a_timeline_survive_a_gc_of_another_process(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=KeepBest("m", 2))
    done = commit_all(line, state, 5, 4, 1)
    other = Store.open(store.path)
    last = other.save(train_step(state, 0.1, 99), parent=base)
    plan = other.plan_gc(KeepLast(1))
    assert "best m (5)" in str(plan)
    plan.execute()
    assert checkpoint_ids(store) == {done[0][0].id, done[1][0].id, last.id}
    with pytest.raises(PinnedError, match="timelines/main"):
        other.forget(done[0][0].id)
    commit_all(line, state, 9, seed=50)
    assert last.id in checkpoint_ids(store)


def test_a_gc_between_saving_and_protecting_waits(
    store: Store, base: Base, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Timeline(store, base, retention=KeepLast(2))
    other = Store(LocalBackend(Path(store.path), lock_timeout=0.0))
    refused = []
    save = store.save

    def save_and_collect(*args: object, **kwargs: object) -> Checkpoint:
        ckpt = save(*args, **kwargs)  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as pool, pytest.raises(BusyError, match="gc waited 0 s"):
            pool.submit(other.evict, [ckpt.id]).result()
        refused.append(ckpt.id)
        return ckpt

    monkeypatch.setattr(store, "save", save_and_collect)
    done = commit_all(line, state, 1, 2)
    assert refused == [ckpt.id for ckpt, _ in done]
    assert checkpoint_ids(store) == set(refused)


def test_a_killed_timeline_is_taken_up_again(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(2), name="run")
    done = commit_all(line, state, 1, 2)
    line.rollback(done[1][0])
    branch = commit_all(line, done[1][1], 3, 4, seed=10)
    # Killed between saving and protecting.
    stray = store.save(
        train_step(state, 0.2, 77),
        parent=done[1][0],
        metadata={"timeline": {"name": "run", "branch": 1, "index": 3}},
    )
    foreign = store.save(state, parent=base, metadata={"timeline": "of another program"})
    again = Timeline(Store.open(store.path), base, retention=KeepLast(2), name="run")
    assert stray.id not in checkpoint_ids(store)
    assert foreign.id in checkpoint_ids(store)
    assert (again.branch, again.root) == (1, store.get(done[1][0].id))
    expected = commit_all(line, branch[-1][1], 5, seed=20)[0][0].id
    store.unpin(f"timelines/run/{expected}")
    store.forget(expected)
    assert commit_all(again, branch[-1][1], 5, seed=20)[0][0].id == expected


def test_another_name_is_another_timeline(store: Store, base: Base, state: State) -> None:
    one = Timeline(store, base, retention=KeepLast(1), name="one")
    kept = commit_all(one, state, 1, 2)[-1][0]
    other = Timeline(store, base, retention=KeepLast(1), name="other")
    commit_all(other, state, 3, 4, seed=10)
    assert other.branch == 0
    assert kept.id in checkpoint_ids(store)
    assert len(checkpoint_ids(store)) == 2


def test_a_policy_sees_the_steps_of_commits(store: Store, base: Base, state: State) -> None:
    class KeepEvery(Policy):
        def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
            for candidate in candidates:
                if candidate.step is not None and candidate.step % 2 == 0:
                    yield candidate, Reason(text=f"step {candidate.step}", protected=True)

    line = Timeline(store, base, retention=KeepEvery())
    commit_all(line, state, 1, 2, 3)
    line.commit(train_step(state, 0.02, 9))
    assert [ckpt.step for ckpt in line.checkpoints()] == [0, 2]
    line.close()
    store.save(train_step(state, 0.02, 10), step=5)
    store.plan_gc(KeepEvery()).execute()
    assert [ckpt.step for ckpt in store.log()] == [0, 2]


def test_rewinding_repeats_ids(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(9))
    done = commit_all(line, state, 1, 2, 3)
    line.rewind(1)
    assert checkpoint_ids(store) == {done[0][0].id} == set(line.kept())
    again = train_step(done[0][1], 0.02, 1)
    assert line.commit(again, step=1, metrics={"m": 2}).id == done[1][0].id
    line.rollback(done[0][0])
    line.rewind(0)
    assert done[0][0].id in checkpoint_ids(store)
    with pytest.raises(InvalidInputError):
        line.rewind(-1)


def test_closing_drops_the_refs_and_keeps_the_checkpoints(
    store: Store, base: Base, state: State
) -> None:
    with Timeline(store, base, retention=KeepLast(2), name="run") as line:
        done = commit_all(line, state, 1, 2)
        assert store.refs() != {}
    assert store.refs() == {}
    assert checkpoint_ids(store) == {ckpt.id for ckpt, _ in done}
    # A new timeline does not continue a closed one of its name.
    new = Timeline(store, base, retention=KeepLast(1), name="run")
    commit_all(new, state, 3, 4, seed=30)
    Timeline(store, base, retention=KeepLast(1), name="run")
    assert {ckpt.id for ckpt, _ in done} < checkpoint_ids(store)


def test_after_an_error_the_refs_stay(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(1))
    commit_all(line, state, 1)
    with pytest.raises(KeyError), line:
        raise KeyError
    assert len(store.refs()) == 1


def test_a_budget_that_is_too_small_is_reported_and_loses_nothing(
    store: Store, base: Base, state: State
) -> None:
    line = Timeline(store, base, retention=KeepBest("m") | DiskBudget(1))
    with pytest.raises(OverBudgetError, match=r"do not fit.* 1 B.*would have been best m \(1\)"):
        commit_all(line, state, 1)
    assert store.log() == []
    assert store.stats().stored_bytes == 0
    line.retention = KeepBest("m")
    ((ckpt, _),) = commit_all(line, state, 1)
    assert set(line.kept()) == {ckpt.id}


def test_bytes_are_those_on_disk(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(1))
    for number in range(4):
        commit_all(line, state, 1, seed=number)
        assert line.last_commit is not None
        assert line.last_commit.bytes == store.stats().on_disk_bytes
        assert line.last_commit.peak_bytes >= line.last_commit.bytes
    assert len(line.last_commit.dropped) == 1
    assert line.last_commit.peak_bytes > line.last_commit.bytes


def test_a_checkpoint_may_be_the_start(store: Store, base: Base, state: State) -> None:
    start = store.save(train_step(state, 0.1, 1), parent=base)
    line = Timeline(store, start, retention=KeepLast(1))
    done = commit_all(line, state, 1, 2)
    assert done[0][0].parent == start.id
    assert checkpoint_ids(store) == {start.id, done[1][0].id}


@pytest.mark.parametrize("name", ["main", "earlier"])
def test_a_checkpoint_that_was_the_start_is_never_evicted(
    store: Store, base: Base, state: State, name: str
) -> None:
    with Timeline(store, base, retention=KeepLast(3), name="earlier") as earlier:
        (_, _), (peak, old), (_, _) = commit_all(earlier, state, 1, 3, 2)
        earlier.rollback(peak)
        ((start, start_state),) = commit_all(earlier, old, 2, seed=10)
    line = Timeline(store, start, retention=Champions({"m": "max"}), name=name)
    commit_all(line, start_state, 1, 2, seed=20)

    ((_, _), (peak, state)) = commit_all(line, start_state, 3, 5, seed=30)
    line.rollback(peak)

    assert peak.id in line.kept()
    assert start.id in checkpoint_ids(store)
    assert start.id not in line.kept()
    assert line.last_commit is not None
    assert start.id not in line.last_commit.dropped
    assert start.id not in {store.refs()[ref] for ref in store.refs() if f"/{name}/" in ref}
    ((best, _), (_, _)) = commit_all(line, state, 9, 8, seed=40)
    assert set(line.kept()) == {peak.id, best.id}
    assert set(Timeline(store, base, retention=line.retention, name=name).kept()) == set(
        line.kept()
    )


def test_the_key_of_the_timeline_is_reserved(store: Store, base: Base, state: State) -> None:
    line = Timeline(store, base, retention=KeepLast(1))
    ckpt = line.commit(state, metadata={"note": [1]})
    assert ckpt.metadata["note"] == [1]
    with pytest.raises(InvalidInputError, match="own"):
        line.commit(state, metadata={"timeline": 1})


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 201, 3])
def test_names_that_cannot_be_refs_are_refused(store: Store, base: Base, name: object) -> None:
    with pytest.raises(InvalidInputError):
        Timeline(store, base, retention=KeepLast(1), name=name)  # type: ignore[arg-type]


def test_tied_weights_cost_one_delta_on_a_timeline(tmp_path: Path, store: Store) -> None:
    state = make_state(big=True)
    base = store.add_base(write_base(tmp_path / "big.safetensors", state))
    line = Timeline(store, base, retention=KeepLast(1))
    ckpt = line.commit(train_step(state, 0.02, 1))
    assert ckpt.unreferenced_bytes == 0
    assert ckpt.stored_bytes < 0.03 * ckpt.logical_bytes
