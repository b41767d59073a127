"""The msft-store command: its output, errors and exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from msft_store import (
    Base,
    Champions,
    Checkpoint,
    InvalidInputError,
    KeepBest,
    KeepLast,
    Store,
    Timeline,
)
from msft_store.cli.gc import forget
from msft_store.cli.main import main
from msft_store.cli.plots import draw_changes, draw_lineage, heat_map, heat_text
from msft_store.retention import Candidate, Reason

COMMANDS = (
    *("init", "upgrade", "add-base", "relocate", "log", "inspect", "gc"),
    *("check", "repair", "export", "pin", "unpin", "forget", "unlock", "stats"),
    *("diff", "average", "repack", "import", "completion", "cat", "bisect"),
    *("push", "pull", "clone"),
)


@pytest.fixture
def run_store(tmp_path: Path) -> Store:
    """Return a store with a base, a root, and a commit on top of it."""
    torch.manual_seed(0)
    state = {f"layer{n}.weight": (torch.randn(64, 50) * 0.02).bfloat16() for n in range(2)}
    (tmp_path / "model").mkdir()
    safetensors.torch.save_file(state, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    store = Store.create(tmp_path / "store")
    base = store.add_base(tmp_path / "model")
    timeline = Timeline(
        store, base, retention=Champions({"arith": "max"}) | KeepBest("overall"), name="msft"
    )
    state["layer0.weight"] = state["layer0.weight"] * 1.01
    first = timeline.commit(state, 10, {"arith": 0.5, "overall": 0.4, "odd": float("nan")})
    timeline.rollback(first)
    state["layer1.weight"] = state["layer1.weight"] * 1.01
    timeline.commit(state, 20, {"arith": 0.6, "overall": 0.6})
    return store


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command; return exit code, stdout and stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command with ``--json``; return its output, strictly parsed."""
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_store_from_nothing(capsys: pytest.CaptureFixture[str], run_store: Store) -> None:
    path = Path(run_store.path).parent / "new"
    assert run(capsys, "init", path)[0] == 0
    code, out, _ = run(capsys, "--store", path, "add-base", path.parent / "model")
    assert code == 0
    assert "2 tensors" in out
    assert run(capsys, "log", "--store", path)[1] == "no checkpoints yet\n"
    assert "model" in run(capsys, "inspect", "--store", path)[1]
    code, _, err = run(capsys, "init", path)
    assert code == 1
    assert "already" in err
    assert "Store." not in err


def test_store_is_found_by_environment_and_current_directory(
    capsys: pytest.CaptureFixture[str], run_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSFT_STORE", run_store.path)
    assert len(document(capsys, "log")) == 2
    monkeypatch.delenv("MSFT_STORE")
    monkeypatch.chdir(run_store.path)
    assert len(document(capsys, "log")) == 2


def test_an_empty_store_is_reported(capsys: pytest.CaptureFixture[str], store: Store) -> None:
    assert run(capsys, "--store", store.path, "inspect")[1] == "the store is empty\n"


def test_inspect_shows_the_lineage(capsys: pytest.CaptureFixture[str], run_store: Store) -> None:
    root, tip = run_store.log()
    code, out, _ = run(capsys, "--store", run_store.path, "inspect")
    lines = out.splitlines()
    assert code == 0
    assert lines[1].startswith("base ")
    assert lines[2].startswith(f"└─ {root.id[:12]}")
    assert lines[3].startswith(f"   └─ {tip.id[:12]}")
    assert "arith=0.6" in lines[3]
    assert lines[2].endswith("root of the branch")
    assert lines[3].endswith("champion of arith (0.6), best overall (0.6)")
    found = document(capsys, "--store", run_store.path, "inspect")
    assert [ckpt["step"] for ckpt in found["checkpoints"]] == [10, 20]
    assert found["checkpoints"][0]["metrics"]["odd"] == "nan"


def test_reasons_that_keep_a_checkpoint_are_distinct_and_short(
    capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    twice, many, bare = (store.save({"w": torch.ones(n)}, step=n) for n in (1, 2, 3))
    ref = "timelines/main/{0.id}".format
    store.pin(twice, ref(twice), note={"reasons": ["best loss (1.9)", "best loss (1.9)"]})
    store.pin(twice, "timelines/other/root", note={"branch": 1})
    store.pin(many, ref(many), note={"reasons": [f"champion of task{n}" for n in range(9)]})
    store.pin(many, "mine")
    store.pin(bare, ref(bare), note={"reasons": 5})

    _, out, _ = run(capsys, "--store", store.path, "inspect")

    reasons = [line.rpartition(" %  ")[2] for line in out.splitlines()[2:5]]
    assert reasons == [
        "best loss (1.9)",
        "mine, champion of task0, champion of task1 +7",
        "timelines/main",
    ]
    _, out, _ = run(capsys, "--store", store.path, "inspect", twice.id)
    assert f"{ref(twice)}: best loss (1.9); timelines/other/root: pinned\n" in out
    _, out, _ = run(capsys, "--store", store.path, "gc", "--dry-run")
    assert f"pinned as {ref(twice)} (best loss (1.9)); pinned as timelines/other/root\n" in out


def test_inspect_shows_where_bytes_come_from(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    root, tip = run_store.log()
    _, out, _ = run(capsys, "inspect", tip.id[:6], "--store", run_store.path)
    assert "against base" in out
    assert "champion of arith" in out
    tensors = document(capsys, "inspect", root.id[:6], "--store", run_store.path)["tensors"]
    assert tensors[1]["how"] == ["equal to base"]
    assert tensors[1]["stored_bytes"] == 0
    assert 0 < tensors[0]["stored_bytes"] < tensors[0]["logical_bytes"]


def test_inspect_shows_a_base(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    at, base = ("--store", run_store.path), run_store.bases()[0]
    code, out, _ = run(capsys, *at, "inspect", base.id[:6])
    assert (code, out.splitlines()[0].split()) == (0, ["base", base.id])
    assert "12.8 kB" in out
    assert "1, 13.0 kB, present" in out
    assert out.splitlines()[-1].split() == ["layer1.weight", "bfloat16", "64x50", "6.4", "kB"]
    (tmp_path / "model").rename(tmp_path / "moved")
    assert "msft-store relocate" in run(capsys, *at, "inspect", base.id)[1]
    found = document(capsys, *at, "inspect", base.id)
    assert (found["path"], found["gone"]) == (base.path, True)
    assert [tensor["logical_bytes"] for tensor in found["tensors"]] == [6400, 6400]
    code, _, err = run(capsys, *at, "inspect", "nobody")
    assert (code, "no checkpoint 'nobody'" in err) == (1, True)


def test_inspect_shows_the_present_size_of_a_checkpoint(
    capsys: pytest.CaptureFixture[str], store: Store, base: Base, ckpt: Checkpoint
) -> None:
    # This checkpoint has no base, so its chunks are stored whole and then serve the other one too.
    store.save({n: t for n, t in store.load(ckpt).items() if t.ndim}, step=8)
    store.plan_gc().execute()
    at = ("--store", store.path)
    found = document(capsys, *at, "inspect", ckpt.id)["stored_bytes"]
    assert found > 2 * ckpt.stored_bytes
    assert found <= store.stats().stored_bytes
    assert store.encoded_bytes([ckpt]) == {ckpt.id: found}


def test_gc_plans_and_frees(capsys: pytest.CaptureFixture[str], run_store: Store) -> None:
    at = ("--store", run_store.path)
    for name in run_store.refs():
        assert run(capsys, *at, "unpin", name)[0] == 0
    code, out, _ = run(capsys, *at, "gc", "--keep-best", "overall", "--dry-run")
    assert code == 0
    assert "forget" in out
    assert "best overall (0.6)" in out
    assert len(run_store.log()) == 2
    plan = document(capsys, *at, "gc", "--keep-best", "arith:min", "--dry-run")
    assert plan["keep"][0]["id"] == run_store.log()[0].id
    result = document(capsys, *at, "gc", "--keep-last", "1")
    assert result["freed_bytes"] > 0
    assert [ckpt.step for ckpt in run_store.log()] == [20]
    assert run(capsys, *at, "check", "--read-data")[:2] == (0, "no errors (all data read)\n")


def test_gc_refuses_a_metric_that_no_checkpoint_has(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    for name in run_store.refs():
        run_store.unpin(name)
    code, _, err = run(capsys, "--store", run_store.path, "gc", "--keep-best", "overal:min")
    assert code == 1
    assert "no checkpoint has a metric 'overal'; the nearest is 'overall'" in err
    assert len(run_store.log()) == 2


@pytest.mark.parametrize("command", ["gc", "forget"])
def test_a_metric_without_a_finite_value_drops_nothing(
    capsys: pytest.CaptureFixture[str], store: Store, command: str
) -> None:
    for step, loss in enumerate((math.nan, math.inf, -math.inf)):
        store.save({"w": torch.ones(step + 1)}, step=step, metrics={"loss": loss})
    code, _, err = run(capsys, "--store", store.path, command, "--keep-best", "loss:min")
    assert (code, "no checkpoint has a finite 'loss'" in err) == (1, True)
    assert len(store.log()) == 3


def test_diff_lists_and_draws_the_changes(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    at, (root, tip) = ("--store", run_store.path), run_store.log()
    code, out, _ = run(capsys, *at, "diff", root.id[:8], tip.id[:8])
    assert code == 0
    assert "1 of 2 tensors differ" in out
    assert "layer1.weight" in out
    assert "layer0.weight" not in out
    picture = tmp_path / "heat.svg"
    found = document(capsys, *at, "diff", tip.base, tip.id, "--plot", picture)
    assert [tensor["kind"] for tensor in found["tensors"]] == ["changed", "changed"]
    assert found["changed"] == sum(tensor["changed"] for tensor in found["tensors"])
    assert picture.read_text().startswith("<?xml")
    code, _, err = run(capsys, *at, "diff", root.id, "nobody")
    assert (code, "nobody" in err) == (1, True)
    code, _, err = run(capsys, *at, "diff", root.id, tip.id, "--plot", tmp_path / "heat.what")
    assert (code, "heat.what" in err) == (1, True)


def test_a_heat_map_has_one_row_for_each_layer(
    capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    state = {f"h.{n}.{kind}": torch.zeros(4, 4) for n in range(11) for kind in ("up", "down")}
    one = store.save(state)
    state["h.10.up"] = torch.ones(4, 4)
    other = store.save(state)
    _, out, _ = run(capsys, "--store", store.path, "diff", one.id, other.id)
    rows = [line for line in out.splitlines() if line.endswith("|")]
    assert [row.split("|")[0].strip() for row in rows] == [str(n) for n in range(11)]
    assert [row for row in rows if "█" in row] == ["   10 |  ██|"]


def test_a_heat_map_separates_stacks_and_experts(store: Store, tmp_path: Path) -> None:
    names = [f"{stack}.{n}.fc.weight" for stack in ("encoder.h", "decoder.h") for n in (0, 1)]
    one = store.save({name: torch.zeros(4) for name in names})
    other = store.save({name: torch.tensor([1.0, 1, 0, at]) for at, name in enumerate(names)})

    rows = heat_text(store.diff(one, other)).splitlines()[1:-1]

    assert [row.split() for row in rows] == [
        ["decoder.h.0", "|██|"],
        ["decoder.h.1", "|██|"],
        ["encoder.h.0", "|▓▓|"],
        ["encoder.h.1", "|██|"],
    ]
    experts = [f"h.{n}.mlp.{at}.up" for n in (0, 1) for at in range(50)]
    one = store.save({name: torch.zeros(1) for name in experts})
    other = store.save({name: torch.tensor([float(name > "h.1.mlp.3")]) for name in experts})
    layers, kinds, shares = heat_map(store.diff(one, other))
    assert (layers, kinds, shares[0]) == (["0", "1"], ["mlp.*.up"], [0.0])
    assert heat_text(store.diff(one, one)) == ""
    with pytest.raises(InvalidInputError, match="in common"):
        draw_changes(store.diff(one, store.save({"w": torch.ones(1)})), tmp_path / "heat.png")


def test_a_picture_of_thousands_of_checkpoints_has_a_limited_size(
    store: Store, tmp_path: Path
) -> None:
    root = store.save({"w": torch.ones(1)}, step=0, metrics={"$\\frac$": 1.0})
    chain = [root]
    for step in range(1, 2000):
        identity = f"{step:032x}"
        chain.append(dataclasses.replace(chain[-1], id=identity, parent=chain[-1].id, step=step))
    fork = [dataclasses.replace(root, id=f"f{n:031x}", parent=root.id, step=5) for n in range(3)]

    path = draw_lineage([*chain, *fork], [], {"$\\frac$": root.id}, tmp_path / "lineage.png")

    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width < 2_000
    assert height < 1_000


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list of all figures that are drawn."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_no_text_of_a_picture_is_cut_off(
    drawn: list[Figure], run_store: Store, tmp_path: Path
) -> None:
    root = run_store.log()[0]
    metrics = {f"eval_of_a_long_name_{n}_loss": 1.2345678 for n in range(9)}
    chain = [root]
    for n in range(1, 8):
        chain.append(
            dataclasses.replace(
                root, id=f"{n:032x}", parent=chain[-1].id, step=500 + n, metrics=metrics
            )
        )
    names = {"a-long-name-that-somebody-gave-to-it": chain[-1].id}
    draw_lineage(chain, run_store.bases(), names, tmp_path / "lineage.png")
    draw_lineage([], [], {}, tmp_path / "empty.svg")
    diffs = run_store.diff(root.base or "", root)
    draw_changes(diffs, tmp_path / "heat.png", title=f"{root.id[:12]} to {chain[-1].id[:12]}")
    assert len(drawn) == 3
    for figure in drawn:
        # The file has other pixels than the figure.
        figure.draw_without_rendering()
        frame = figure.bbox.padded(1)
        words = [word for word in figure.findobj(Text) if word.get_text() and word.get_visible()]
        assert words
        for word in words:
            box = word.get_window_extent()
            assert all(frame.contains(*corner) for corner in box.corners()), (word, box)


def test_a_base_is_drawn_before_the_first_step(
    drawn: list[Figure], run_store: Store, tmp_path: Path
) -> None:
    draw_lineage(run_store.log(), run_store.bases(), {}, tmp_path / "lineage.pdf")
    axis = drawn[0].axes[0].xaxis
    ticks = {
        tick.get_text(): place
        for tick, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
    }
    assert ticks.pop("base") < 10
    assert ticks == {name: float(name) for name in ticks}
    assert min(ticks.values()) == 10


@pytest.mark.parametrize("name", ["heat.gif", "heat", "heat.png.txt"])
def test_a_picture_has_a_suffix_that_the_help_names(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path, name: str
) -> None:
    at, (root, tip) = ("--store", run_store.path), run_store.log()
    for command in (("inspect",), ("diff", root.id, tip.id)):
        code, _, err = run(capsys, *at, *command, "--plot", tmp_path / name)
        assert (code, ".png or .svg or .pdf" in err) == (1, True)
    assert not (tmp_path / name).exists()


def test_the_lineage_is_drawn(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    at, picture = ("--store", run_store.path), tmp_path / "lineage.png"
    assert document(capsys, *at, "inspect", "--plot", picture)["plot"] == str(picture)
    assert picture.read_bytes()[1:4] == b"PNG"
    code, _, err = run(capsys, *at, "inspect", run_store.log()[0].id, "--plot", picture)
    assert (code, "whole lineage" in err) == (1, True)


def test_forget_by_rules_is_planned_first(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    at = ("--store", run_store.path)
    for name in run_store.refs():
        run_store.unpin(name)
    tagged = run_store.save({"w": torch.ones(1)}, tags=["keep"])
    code, out, _ = run(
        capsys, *at, "forget", "--keep-last", "1", "--keep-best", "arith", "--dry-run"
    )
    assert code == 0
    assert out.startswith("would forget 1 checkpoint\n")
    assert "best arith (0.6)" in out
    assert len(run_store.log()) == 3
    found = document(capsys, *at, "forget", "--keep-tag", "keep")
    assert (len(found["forget"]), [kept["id"] for kept in found["keep"]]) == (2, [tagged.id])
    assert run_store.log() == [tagged]


def test_the_output_of_a_dry_run_is_in_the_conditional(
    capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    at = ("--store", store.path)
    for n in range(1, 4):
        store.save({"w": torch.ones(n)}, step=n)
    for command, heading in (
        (["repack"], "made 1 pack of 3; freed "),
        (["forget", store.log()[0].id], "forgot 1 checkpoint\n"),
        (["gc", "--keep-last", "1"], "freed "),
    ):
        planned = run(capsys, *at, *command, "--dry-run")[1]
        assert planned.startswith("would ")
        assert planned.endswith("nothing was changed (--dry-run)\n")
        done = run(capsys, *at, *command)[1]
        assert done.startswith(heading)
        assert "would" not in done
        assert done.splitlines()[1:2] == planned.splitlines()[1:2]


def test_forget_reports_that_there_is_nothing_to_forget(
    capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    store.save({"w": torch.ones(1)})
    for how in ([], ["--dry-run"]):
        _, out, _ = run(capsys, "--store", store.path, "forget", "--keep-last", "1", *how)
        assert out.splitlines()[0] == "nothing to forget"
        assert "gc" not in out


def test_forget_by_rules_keeps_checkpoints_that_were_pinned_meanwhile(store: Store) -> None:
    saved = [store.save({"w": torch.ones(n)}, step=n) for n in range(1, 5)]
    other = Store.open(store.path)

    class PinnedWhileDeciding(KeepLast):
        def keep(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Reason]]:
            other.pin(candidates[0].id, "mine")
            return super().keep(candidates)

    found, text = forget(store, [], PinnedWhileDeciding(1), dry_run=False)

    assert [one["id"] for one in found["forget"]] == [saved[1].id, saved[2].id]
    assert [one["id"] for one in found["keep"]] == [saved[3].id, saved[0].id]
    assert "forgot 2 checkpoints" in text
    assert store.log() == [saved[0], saved[3]]


def test_forget_takes_names_or_rules(capsys: pytest.CaptureFixture[str], run_store: Store) -> None:
    at, (root, tip) = ("--store", run_store.path), run_store.log()
    for wrong in ([], [root.id, "--keep-last", "1"]):
        code, _, err = run(capsys, *at, "forget", *wrong)
        assert (code, "one of them" in err) == (1, True)
    for name in run_store.refs():
        run_store.unpin(name)
    run_store.pin(tip, "best")
    code, _, err = run(capsys, *at, "forget", root.id, tip.id)
    assert (code, "unpin" in err) == (1, True)
    assert len(run_store.log()) == 2
    code, _, err = run(capsys, *at, "forget", "--keep-tag", "nobody")
    assert (code, "no checkpoint has the tag nobody" in err) == (1, True)
    assert run(capsys, *at, "forget", root.id)[0] == 0
    assert run_store.log() == [tip]


def test_repack_and_import(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    at, tip = ("--store", run_store.path), run_store.log()[-1]
    assert document(capsys, *at, "repack", "--dry-run")["merge"]
    assert document(capsys, *at, "repack")["bytes"] > 0
    assert "nothing to do" in run(capsys, *at, "repack")[1]
    assert run(capsys, *at, "export", tip.id, tmp_path / "out")[0] == 0
    facts = ("--parent", tip.base, "--step", "7", "--metric", "loss=0.5", "--tag", "x")
    found = document(capsys, *at, "import", tmp_path / "out", *facts, "--ref", "mine")
    saved = run_store.get("mine")
    assert (saved.id, saved.step, saved.tags) == (found["id"], 7, ("x",))
    assert saved.metrics == {"loss": 0.5}
    assert saved.stored_bytes == tip.stored_bytes
    known = run_store.log()
    for wrong in (("--metric", "x"), ("--metric", "=1"), ("--parent", "nobody"), ("--ref", "a b")):
        code, _, err = run(capsys, *at, "import", tmp_path / "out", *wrong)
        assert (code, err.startswith("msft-store: ")) == (1, True)
    assert run_store.log() == known
    plain = ("import", tmp_path / "out", "--step", "8")
    assert f"a difference from base {tip.base[:12]}" in run(capsys, *at, *plain)[1]
    assert run_store.log()[-1].stored_bytes == tip.stored_bytes
    assert document(capsys, *at, *plain, "--parent", "none")["parent"] is None
    assert run_store.log()[-1].stored_bytes > 2 * tip.stored_bytes
    # A file of another model.
    safetensors.torch.save_file({"odd": torch.ones(50)}, tmp_path / "odd.safetensors")
    assert "--parent" in run(capsys, *at, "import", tmp_path / "odd.safetensors")[1]
    assert run_store.log()[-1].parent is None
    (tmp_path / "old").mkdir()
    torch.save({}, tmp_path / "old" / "pytorch_model.bin")
    for path in (tmp_path / "old", tmp_path / "old" / "pytorch_model.bin"):
        code, _, err = run(capsys, *at, "import", path)
        assert (code, "pytorch_model.bin may be a pickle" in err) == (1, True)


def test_a_shell_completes_commands_and_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, script, _ = run(capsys, "completion", "bash")
    assert code == 0
    (tmp_path / "complete.sh").write_text(script)
    asked = """
    source "$1"; COMP_WORDS=(msft-store $2); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $(complete -p msft-store | sed 's/.*-F \\([^ ]*\\) .*/\\1/') msft-store; echo "${COMPREPLY[@]}"
    """
    (tmp_path / "my-model").mkdir()

    def completed(typed: str) -> set[str]:
        done = subprocess.run(
            ["/bin/bash", "-c", asked, "bash", tmp_path / "complete.sh", typed],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        return set(done.stdout.split())

    assert {"relocate", "repack", "repair"} <= completed("re")
    assert completed("forget --keep-t") == {"--keep-tag"}
    assert completed("add-base my") == completed("export 3fa9 out --like my") == {"my-model"}
    assert document(capsys, "completion", "zsh")["shell"] == "zsh"


def test_completion_names_the_extra_that_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = run(capsys, "completion", "bash")
    assert (code, "pip install 'msft-store[report]'" in err) == (1, True)


def test_pins_protect(capsys: pytest.CaptureFixture[str], run_store: Store) -> None:
    at, tip = ("--store", run_store.path), run_store.log()[-1]
    assert run(capsys, *at, "pin", tip.id[:8], "best")[0] == 0
    code, _, err = run(capsys, *at, "forget", "best")
    assert code == 1
    assert "unpin" in err
    assert run(capsys, *at, "unpin", "best")[0] == 0
    code, _, err = run(capsys, *at, "unpin", "best")
    assert code == 1
    assert "no ref 'best'" in err


def test_export_is_a_plain_model_directory(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    tip = run_store.log()[-1]
    code, _, _ = run(capsys, "--store", run_store.path, "export", tip.id, tmp_path / "out")
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    exported = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in run_store.load(tip).items():
        assert torch.equal(exported[name].view(torch.int16), tensor.view(torch.int16))
    code, _, err = run(capsys, "--store", run_store.path, "export", tip.id, tmp_path / "out")
    assert code == 1
    assert "not empty" in err


def test_export_reports_a_missing_configuration(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    run_store.pin(run_store.save({"w": torch.ones(1)}), "bare")
    at = ("--store", run_store.path, "export", "bare")
    assert "--like DIRECTORY" in run(capsys, *at, tmp_path / "bare")[1]
    found = document(capsys, *at, tmp_path / "whole", "--like", tmp_path / "model")
    assert found["configured"] is True
    assert (tmp_path / "whole" / "config.json").read_text() == "{}"
    for wrong in (tmp_path / "nowhere", tmp_path / "store"):
        code, _, err = run(capsys, *at, tmp_path / "new", "--like", wrong)
        assert (code, wrong.name in err) == (1, True)
    assert not (tmp_path / "new").exists()


def test_relocate(capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path) -> None:
    at, base = ("--store", run_store.path), run_store.bases()[0]
    (tmp_path / "model").rename(tmp_path / "moved")
    code, _, err = run(capsys, *at, "export", run_store.log()[-1].id, tmp_path / "out")
    assert code == 1
    assert "relocate" in err
    assert run(capsys, *at, "relocate", base.id[:8], tmp_path / "moved")[0] == 0
    assert run(capsys, *at, "check", "--read-data")[0] == 0


def test_check_reports_damage_with_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    pack = next(Path(run_store.path).glob("packs/*.pack"))
    data = bytearray(pack.read_bytes())
    data[40] ^= 1
    pack.write_bytes(data)
    code, out, _ = run(capsys, "--store", run_store.path, "check", "--read-data")
    assert code == 3
    assert "checkpoint" in out
    assert "tensor" in out
    assert pack.name in out


@pytest.mark.parametrize("how", [(), ("--read-data",)])
def test_check_reports_a_missing_base_in_one_line(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path, how: tuple[str, ...]
) -> None:
    (tmp_path / "model").rename(tmp_path / "moved")
    at, base = ("--store", run_store.path), run_store.bases()[0].id[:12]
    code, out, _ = run(capsys, *at, "check", *how)
    finding, verdict = out.splitlines()
    assert code == 3
    assert finding.startswith(f"base {base} is no longer at {tmp_path / 'model'}")
    assert "2 checkpoints cannot be restored without it" in finding
    assert finding.endswith(f"msft-store relocate {base} NEW_PATH")
    assert verdict.startswith("0 of 2 checkpoints are sound, 2 as soon as")
    assert "damaged" not in out


def test_check_separates_a_changed_base_from_damage(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    at, (root, tip) = ("--store", run_store.path), run_store.log()
    model = tmp_path / "model" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    data[-6401] ^= 1
    model.write_bytes(data)
    code, out, _ = run(capsys, *at, "check", "--read-data")
    finding, verdict = out.splitlines()
    assert code == 3
    assert finding.startswith(
        f"base {run_store.bases()[0].id[:12]}, 2 of 2 tensors: {model} changed"
    )
    assert "2 checkpoints cannot be restored without it" in finding
    assert "repair" not in out
    Path(run_store.path, "manifests", f"{tip.id}.json").write_text("{}")
    code, out, _ = run(capsys, *at, "check", "--read-data")
    damage, *_, finding, verdict, advice = out.splitlines()
    assert damage.startswith(f"checkpoint {tip.id[:12]}: ")
    assert "; 1 checkpoint cannot" in finding
    assert "0 of 2 checkpoints are sound, 1 as soon as" in verdict
    assert f"damaged: {tip.id[:12]} (" in verdict
    assert "repair" in advice
    code, out, _ = run(capsys, *at, "check", "--read-data", "--json")
    found = json.loads(out)
    assert len([one for one in found["findings"] if one["tensor"]]) == 4
    assert found["damaged"] == [tip.id, root.id]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("log",), "no store at"),
        (("inspect", "abcd"), "no store at"),
        (("gc",), "no store at"),
    ],
)
def test_a_missing_store_is_reported(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    code, out, err = run(capsys, "--store", tmp_path / "none", *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_lost_config_leads_to_repair_not_to_init(
    capsys: pytest.CaptureFixture[str], run_store: Store, damage: str
) -> None:
    config = Path(run_store.path) / "store.json"
    config.unlink() if damage == "gone" else config.write_bytes(b"{}")
    for command in ("log", "check", "gc"):
        code, out, err = run(capsys, "--store", run_store.path, command)
        assert (code, out) == (1, "")
        assert "store.json" in err
        assert "msft-store repair" in err
        assert "init" not in err
        assert "msft-store check" not in err
    assert run(capsys, "--store", run_store.path, "repair")[0] == 0
    assert len(document(capsys, "log", "--store", run_store.path)) == 2


def test_unknown_checkpoint_names_the_nearest(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    tip = run_store.log()[-1]
    wrong = tip.id[:10] + "x"
    code, _, err = run(capsys, "--store", run_store.path, "inspect", wrong)
    assert code == 1
    assert f"the nearest is {tip.id}" in err


def test_an_id_that_is_too_short_is_refused(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    at, tip = ("--store", run_store.path), run_store.log()[-1]
    for identity in (tip.id, run_store.bases()[0].id):
        short = identity[:3]
        for command in (("inspect", short), ("diff", short, tip.id)):
            code, _, err = run(capsys, *at, *command)
            assert (code, "at least 4 characters" in err) == (1, True)


def test_log_shows_the_reasons_that_keep_a_checkpoint(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    run_store.pin(run_store.save({"w": torch.ones(1)}, tags=["x"]), "mine")
    lines = run(capsys, "--store", run_store.path, "log")[1].splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == [
        "kept by",
        "root of the branch",
        "champion of arith (0.6), best overall (0.6)",
        "mine",
    ]


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("gc", "--keep-last", "many")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_an_invalid_count_is_reported_with_the_name_of_the_option(
    capsys: pytest.CaptureFixture[str], number: str
) -> None:
    with pytest.raises(SystemExit):
        main(["forget", "--keep-last", number])
    error = capsys.readouterr().err
    assert "argument --keep-last: " in error
    assert number in error
    assert "KeepLast" not in error


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"example: msft-store {name}" in " ".join(capsys.readouterr().out.split())


def test_average_saves_a_mean_of_checkpoints(
    capsys: pytest.CaptureFixture[str], run_store: Store
) -> None:
    first, second = run_store.log()
    at = ("--store", run_store.path)

    code, out, _ = run(capsys, *at, "average", first.id[:8], second.id, "--weights", "3,1")
    found = document(
        capsys, *at, "average", first.id, second.id, "--weights", "3,1", "--ref", "mean"
    )

    mean = run_store.get("mean")
    assert (code, found["id"]) == (0, mean.id)
    assert f"{first.id[:12]}  0.75" in out
    assert found["average"][1] == {"checkpoint": second.id, "weight": 0.25}
    code, _, error = run(capsys, *at, "average", first.id, "--weights", "one")
    assert code == 1
    assert "--weights are numbers such as 0.7,0.3, not 'one'" in error


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\u202eb\nc\ud800"


def test_untrusted_text_cannot_control_the_terminal(
    capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    ckpt = store.save(
        {HOSTILE: torch.ones(3)}, metrics={HOSTILE: 1.0}, tags=[HOSTILE], metadata={HOSTILE: 1}
    )
    store.pin(ckpt, "odd", note={"reasons": 5})
    store.pin(ckpt, "best", note={"reasons": [HOSTILE, 7]})
    for command in (["log"], ["inspect"], ["inspect", ckpt.id], ["gc"], ["check"], ["stats"]):
        code, out, _ = run(capsys, "--store", store.path, *command)
        assert code == 0
        assert out.replace("\n", "").isprintable()
        assert "\nc\\ud800" not in out
    code, _, err = run(capsys, "--store", store.path, "inspect", HOSTILE[:-1])
    assert code == 1
    assert err.replace("\n", "").isprintable()


def test_a_closed_output_is_no_error(run_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--store", run_store.path, "log"]) == 0


@pytest.mark.parametrize("command", [["log"], ["inspect", "--json"], ["stats"]])
def test_an_output_that_cannot_be_written_is_an_error_without_a_traceback(
    run_store: Store, command: list[str]
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "msft_store.cli.main", "--store", run_store.path, *command],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "msft-store: cannot write the output: [Errno 28] No space left on device"
    ]


def test_a_missing_base_is_reported(
    capsys: pytest.CaptureFixture[str], run_store: Store, tmp_path: Path
) -> None:
    commands = [["inspect"], ["stats"], ["inspect", run_store.log()[0].id]]
    for command in commands:
        assert "no longer at" not in run(capsys, "--store", run_store.path, *command)[1]
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "moved.safetensors")
    for command in commands:
        _, out, _ = run(capsys, "--store", run_store.path, *command)
        assert "no longer at" in out
        assert "msft-store relocate" in out
    assert document(capsys, "--store", run_store.path, "inspect")["bases"][0]["gone"] is True


def test_verbose_logs_to_stderr_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.create(tmp_path / "store")
    for value in (1.0, 2.0):
        store.save({"w": torch.full((3,), value)})
    found = []
    for verbose in ([], ["-v"]):
        clone = tmp_path / f"clone{len(verbose)}"
        shutil.copytree(store.path, clone)
        command = ["gc", "--keep-last", "1", "--json"]
        assert main(["--store", str(clone), *verbose, *command]) == 0
        found.append(capsys.readouterr())
    quiet, loud = found
    assert quiet.err == ""
    assert "INFO msft_store.maintenance.gc: evict checkpoint" in loud.err
    json.loads(loud.out)


def test_the_log_follows_a_replaced_stderr(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", first)
        assert main(["--store", store.path, "log"]) == 0
        handlers = list(logging.getLogger("msft_store").handlers)
        assert main(["--store", store.path, "log"]) == 0
    first.close()
    logging.getLogger("msft_store.storage").warning("a \x1b[2Jmessage")
    assert capsys.readouterr().err == "WARNING msft_store.storage: a \\x1b[2Jmessage\n"
    assert logging.getLogger("msft_store").handlers == handlers
