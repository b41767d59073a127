"""The commands ``cat`` and ``bisect``: their output, files and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from msft_store import Checkpoint, Store
from msft_store.cli.bisect import Search, Verdict
from msft_store.cli.main import main
from tests.support.states import same_bits

WEIGHTS = torch.tensor([[1.0, -2.0], [4.0, 3.0]], dtype=torch.bfloat16)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_cat_summarises_a_tensor(capsys: pytest.CaptureFixture[str], store: Store) -> None:
    odd = torch.tensor([float("nan"), 1.0, float("-inf")])
    state = {"w": WEIGHTS, "odd": odd, "n": torch.tensor(3), "z": torch.tensor([1j])}
    store.pin(store.save({**state, "none": torch.empty(0, 2)}), "best")
    code, out, _ = run(capsys, "cat", f"{store.path}@best", "w")
    assert code == 0
    for text in ("BF16, 8 B", "2x2", "min         -2", "max         4", "mean        1.5"):
        assert text in out
    found = json.loads(run(capsys, "cat", f"{store.path}@best", "w", "--json")[1])
    assert (found["min"], found["max"], found["mean"]) == (-2, 4, 1.5)
    assert found["norm"] == pytest.approx(30**0.5)
    assert (found["dtype"], found["shape"], found["first"]) == ("BF16", [2, 2], [1, -2, 4, 3])
    assert "2 elements, left out" in run(capsys, "cat", "best", "odd", "--store", store.path)[1]
    found = json.loads(run(capsys, "cat", f"{store.path}@best", "odd", "--json")[1])
    assert (found["first"], found["not_finite"], found["mean"]) == (["nan", 1, "-inf"], 2, 1)
    for name, first in (("n", [3]), ("none", []), ("z", ["1j"])):
        document = json.loads(run(capsys, "cat", f"{store.path}@best", name, "--json")[1])
        assert document["first"] == first


def test_cat_writes_a_file_or_raw_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    ckpt = store.save({"w": WEIGHTS}, step=4)
    address, file = f"{store.path}@{ckpt.id[:8]}", tmp_path / "one.safetensors"
    assert run(capsys, "cat", address, "w", "--out", file)[0] == 0
    with safe_open(file, "pt") as opened:
        assert same_bits({"w": opened.get_tensor("w")}, {"w": WEIGHTS})
        assert opened.metadata()["step"] == "4"
    done = subprocess.run(
        [sys.executable, "-m", "msft_store.cli.main", "cat", address, "w", "--out", "-"],
        capture_output=True,
        check=True,
    )
    assert done.stdout == WEIGHTS.view(torch.uint8).numpy().tobytes()
    for words, wanted in (
        (("--out", file), "exists"),
        (("--out", tmp_path / "x.bin"), "FILE.safetensors or -"),
        (("--out", "-", "--json"), "leave one out"),
    ):
        code, _, err = run(capsys, "cat", address, "w", *words)
        assert (code, wanted in err) == (1, True)
    code, _, err = run(capsys, "cat", address, "v")
    assert (code, "no tensor 'v', but w" in err) == (1, True)


@given(
    count=st.integers(2, 40),
    first_bad=st.integers(1, 39),
    skipped=st.sets(st.integers(1, 38), max_size=8),
)
def test_a_search_finds_the_first_bad_one_or_names_all_suspects(
    count: int, first_bad: int, skipped: set[int]
) -> None:
    first_bad = min(first_bad, count - 1)
    search, asked = Search(count), 0
    while (place := search.next()) is not None:
        asked += 1
        bad = Verdict.BAD if place >= first_bad else Verdict.GOOD
        search.tell(place, Verdict.SKIP if place in skipped else bad)
    suspects = search.suspects()
    assert first_bad in suspects
    assert set(suspects) - {suspects[-1]} <= skipped
    assert asked <= (count - 1).bit_length() + 2 * len(skipped)


@pytest.fixture
def history(store: Store) -> list[Checkpoint]:
    """Return eight checkpoints, each the parent of the next; ``w`` is their number."""
    found: list[Checkpoint] = []
    for step in range(8):
        weights = {"w": torch.full((4,), float(step))}
        parent = found[-1] if found else None
        found.append(store.save(weights, parent=parent, step=step, metrics={"loss": step / 10}))
    store.pin(found[0], "good")
    store.pin(found[-1], "bad")
    return found


def command(log: Path, test: str) -> list[str]:
    """Return a command that logs the directory it gets, and exits with ``test`` of ``w``."""
    code = (
        "import sys; from safetensors.torch import load_file as load;"
        "w = int(load(sys.argv[1] + '/model.safetensors')['w'][0]); print('seen', w);"
        f"open({str(log)!r}, 'a').write(sys.argv[1] + '\\n'); sys.exit({test})"
    )
    return ["--", sys.executable, "-c", code, "{}"]


def test_bisect_finds_the_first_bad_checkpoint_and_leaves_nothing(
    tmp_path: Path,
    store: Store,
    history: list[Checkpoint],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    log = tmp_path / "log"
    arguments = ["bisect", store.path, "good", "bad", "--json", *command(log, "w >= 5")]
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["first_bad"]["id"] == history[5].id
    assert found["first_bad"]["metrics"] == {"loss": 0.5}
    assert (found["last_good"]["step"], found["order"]) == (4, "lineage")
    assert [one["verdict"] for one in found["tried"]] == ["good", "bad", "good"]
    assert "seen 3" in err
    folders = log.read_text().split()
    assert len(folders) == len(set(folders)) == 3
    assert list((tmp_path / "temporary").iterdir()) == []
    assert main(["bisect", store.path, "good", "bad", *command(log, "w >= 5")]) == 0
    out, _ = capfd.readouterr()
    assert f"first bad    {history[5].id[:12]}  step 5  loss=0.5" in out


def test_bisect_skips_as_git_does(
    tmp_path: Path, store: Store, history: list[Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    test = "125 if w in (3, 4) else w >= 4"
    code, out, _ = run(
        capsys, "bisect", store.path, "good", "bad", "--json", *command(tmp_path / "log", test)
    )
    found = json.loads(out)
    assert (code, found["first_bad"], found["last_good"]["step"]) == (0, None, 2)
    assert [one["step"] for one in found["suspects"]] == [3, 4, 5]


def test_bisect_goes_by_time_where_a_parent_is_gone(
    tmp_path: Path, store: Store, history: list[Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    store.forget(history[3])
    words: list[Any] = ["bisect", store.path, "good", "bad", *command(tmp_path / "log", "w >= 2")]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert f"first bad    {history[2].id[:12]}" in out
    assert "the order is that of time" in out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["good", "bad", "--", "true"], "write {} in the command"),
        (["bad", "good", "--", "true", "{}"], "swap the two"),
        (["good", "bad", "--", "no-such-command-here", "{}"], "cannot run"),
        (["good", "bad", "--", "sh", "-c", "exit 130", "{}"], "ended with 130"),
        (["good", "bad", "--", "sh", "-c", "kill -9 $$", "{}"], "ended with -9"),
    ],
)
def test_bisect_refuses_in_words(
    store: Store,
    history: list[Checkpoint],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    wanted: str,
) -> None:
    code, _, err = run(capsys, "bisect", store.path, *words)
    assert code == 1
    assert wanted in err
