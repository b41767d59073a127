"""FSDP2 in two processes, which hold parts of the model, compared with two that hold all of it."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from msft_store import OutOfSpaceError, Store
from tests.support.runs import die_after, outcome, signal_after
from tests.support.states import same_bits
from tests.support.tiny_runs import make_config
from tests.support.together import SHARDED, together
from trainer.cli.main import main
from trainer.distributed import this_process
from trainer.journal import effective, read
from trainer.model.forward import compute_in
from trainer.model.sharding import Shards, shard_model
from trainer.report.summary import summarize
from trainer.training import run
from trainer.training.steps import StageSteps

BASE = Path(__file__).parents[3] / "examples" / "stdlib_tasks" / "base"


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda d: summarize(read(Path(d) / "journal.jsonl")))


def start(config, name, *overrides):
    path = Path(config.output_dir).parent / "config.yaml"
    return main(
        ["run", str(path), f"output_dir={directory_of(config, name)}", *overrides, "--quiet"]
    )


def directory_of(config, name):
    return Path(f"{config.output_dir}-{name}")


def decisions(directory):
    """Return the decisions of a run."""
    found = effective(read(directory / "journal.jsonl"))
    return [(r["decision"], r["exclude"]) for r in found if r["event"] == "decided"]


def measured(directory):
    """Return the metrics of a run."""
    found = effective(read(directory / "journal.jsonl"))
    return [r["metrics"] for r in found if r["event"] in ("evaluated", "tested")]


def resumed_from(directory):
    return [r["from"] for r in read(directory / "journal.jsonl") if r["event"] == "resumed"]


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory / "model", dtype="auto").state_dict()


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_a_sharded_run_makes_the_same_decisions_as_an_unsharded_run(tmp_path, metric):
    # Nine validation examples in batches of two: one process has a batch more than the other.
    config = make_config(
        tmp_path,
        train__lr=0.02,
        train__max_grad_norm=1.0,
        msft__max_stages=2,
        evaluation__metric=metric,
        evaluation__batch_size=2,
        evaluation__max_examples=3,
    )
    # So small a model has no right answer, and the loss decides.
    both = dict.fromkeys((0, 1), 4 if metric == "exact_match" else 0)
    assert together(lambda rank: start(config, "whole"), tmp_path) == both

    def watching(rank):
        boxes, seen = Shards.make_boxes, []

        def watched(self, tensors):
            found = boxes(self, tensors)
            seen.append(sum(box.tensor.numel() for box in found))
            return found

        Shards.make_boxes = watched
        code = start(config, "sharded")
        (tmp_path / f"largest-{rank}").write_text(str(max(seen)))
        return code

    assert together(watching, tmp_path, SHARDED) == both
    store = Store.open(directory_of(config, "sharded") / "store")
    (result,) = store.log()
    assert max(len(entry.pieces) for entry in store.tensors(result).values()) == 2
    assert store.check() == []
    # Each process commits and restores its own part alone.
    total = sum(tensor.numel() for tensor in store.load(result).values())
    for rank in (0, 1):
        assert int((tmp_path / f"largest-{rank}").read_text()) < 0.6 * total
    saved = weights(directory_of(config, "sharded"))
    assert same_bits({name: store.load(result)[name] for name in saved}, saved)
    assert decisions(directory_of(config, "sharded")) == decisions(directory_of(config, "whole"))
    # Sums over shards are rounded differently from sums over the whole model.
    expected = [pytest.approx(each, rel=1e-3) for each in measured(directory_of(config, "whole"))]
    assert measured(directory_of(config, "sharded")) == expected


def test_a_sharded_run_of_one_pass_ends_in_the_average_of_an_unsharded_run(tmp_path):
    config = make_config(
        tmp_path,
        method="online",
        train__lr=0.02,
        msft__smoothing=1,
        msft__margin=0.0,
        msft__patience=1,
        average__kind="best",
        average__count=3,
    )
    both = {0: 0, 1: 0}
    assert together(lambda rank: start(config, "whole"), tmp_path) == both
    assert together(lambda rank: start(config, "sharded"), tmp_path, SHARDED) == both
    found = {}
    for name in ("whole", "sharded"):
        records = effective(read(directory_of(config, name) / "journal.jsonl"))
        averages = [r["metrics"] for r in records if r["event"] == "averaged"]
        assert averages
        found[name] = averages
        store = Store.open(directory_of(config, name) / "store")
        assert store.check(read_data=True) == []
        (result,) = store.log()
        saved = weights(directory_of(config, name))
        assert same_bits({key: store.load(result)[key] for key in saved}, saved)
    assert found["sharded"] == [pytest.approx(each, rel=1e-3) for each in found["whole"]]
    assert decisions(directory_of(config, "sharded")) == decisions(directory_of(config, "whole"))


@pytest.mark.parametrize(("killed", "resume_every"), [(0, None), (1, 2)])
def test_a_killed_sharded_run_ends_like_an_undisturbed_run(tmp_path, killed, resume_every):
    config = make_config(
        tmp_path, train__lr=0.02, msft__max_stages=2, log_every=1, resume_every=resume_every
    )
    both = {0: 0, 1: 0}
    assert together(lambda rank: start(config, "whole"), tmp_path, SHARDED) == both
    trained = [
        r for r in read(directory_of(config, "whole") / "journal.jsonl") if r["event"] == "trained"
    ]
    steps = sum(record["stage"] == 1 for record in trained)

    def dying(rank):
        if rank == killed:
            die_after(StageSteps, "train", call=steps + 3)
        return start(config, "killed")

    assert together(dying, tmp_path, SHARDED) == {killed: 9, 1 - killed: 1}
    last = (tmp_path / f"{1 - killed}.txt").read_text()
    assert "another process of this run has ended" in last
    assert "Traceback" not in last
    again = ["resume", str(directory_of(config, "killed")), "--quiet"]
    assert together(lambda rank: main(again), tmp_path, SHARDED) == both
    assert outcome(directory_of(config, "killed")) == outcome(directory_of(config, "whole"))
    assert resumed_from(directory_of(config, "killed")) == [
        "resume_point" if resume_every else "stage_root"
    ]
    assert not (directory_of(config, "killed") / "resume").exists()


def test_a_sharded_run_continues_where_a_signal_ended_it(tmp_path):
    config = make_config(tmp_path, train__lr=0.02, msft__max_stages=2, log_every=1)
    both = {0: 0, 1: 0}
    assert together(lambda rank: start(config, "whole"), tmp_path, SHARDED) == both

    def ended(rank):
        if rank == 1:
            signal_after(StageSteps, "train", call=3)
        return start(config, "ended")

    assert together(ended, tmp_path, SHARDED) == {0: 143, 1: 143}
    (point,) = Store.open(directory_of(config, "ended") / "resume").log()
    assert (point.step, point.metadata["position"]["step"]) == (3, 3)
    entries = Store.open(directory_of(config, "ended") / "resume").tensors(point)
    assert {name.partition(".")[0] for name in entries} == {"model", "optimizer", "rng"}

    again = ["resume", str(directory_of(config, "ended")), "--quiet"]
    assert together(lambda rank: main(again), tmp_path, SHARDED) == both
    assert outcome(directory_of(config, "ended")) == outcome(directory_of(config, "whole"))
    assert resumed_from(directory_of(config, "ended"))[-1] == "resume_point"


def test_settings_that_fsdp_does_not_support_are_refused(tmp_path):
    config = make_config(tmp_path)
    overrides = ["max_disk='2x'", "msft.optimizer_on_rollback=restore"]

    def refused(rank):
        return start(config, "refused", *overrides)

    assert set(together(refused, tmp_path, SHARDED).values()) == {1}
    message = (tmp_path / "0.txt").read_text()
    assert "FSDP does not support max_disk, msft.optimizer_on_rollback=restore" in message


def test_a_process_without_room_pauses_all(tmp_path):
    config = make_config(tmp_path)

    def full(rank):
        def encode(self, boxes, **options):
            raise OutOfSpaceError("no space left")

        if rank == 1:
            Store.encode = encode
        return start(config, "full")

    assert together(full, tmp_path, SHARDED) == {0: 75, 1: 75}
    for rank in (0, 1):
        assert "paused, for there is no room" in (tmp_path / f"{rank}.txt").read_text()


def test_autocast_keeps_no_converted_copy_of_the_layers(tmp_path):
    def watching(rank):
        this_process()
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        compute_in("bfloat16", model, "cpu")
        shard_model(Accelerator(), model, tmp_path, compute_dtype="bfloat16")
        shapes = {
            shape for p in model.model.layers.parameters() for shape in (p.shape, p.shape[::-1])
        }
        kept = []

        def keep(tensor):
            if tensor.dim() == 2 and tensor.shape in shapes:
                kept.append(tensor)
            return tensor

        ids = torch.arange(16)[None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        loss.backward()
        assert kept
        return int(held > 0)

    assert together(watching, tmp_path, SHARDED) == {0: 0, 1: 0}
