"""The arena: rivals give back what they were given, and the tables say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.arena import table
from bench.arena.__main__ import Row, fill, measure, pairs, version_of
from bench.arena.rivals import (
    ARC,
    BLOCK,
    CODEC,
    RIVALS,
    STORE,
    Blocks,
    CutByContent,
    OurStore,
    Safetensors,
    State,
    files_of,
)

FOREIGN = {"fireworks-delta-compression", "moonclip", "zipnn"}
"""Packages that only ``make arena`` installs."""
OWN = [name for name, rival in RIVALS.items() if rival.package not in FOREIGN]


def make_states(dtype: torch.dtype) -> tuple[State, State]:
    """Return a state and a later one with few changes, and values whose bits are easily lost."""
    torch.manual_seed(0)
    old = {"matrix": torch.randn(300, 50).to(dtype), "row": torch.randn(7).to(dtype)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["matrix"][torch.rand(300, 50) < 0.01] *= 1.01
    new["row"][:4] = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-40])
    new["same"] = old["same"] = torch.zeros(3).to(dtype)
    return old, new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_a_rival_gives_back_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    old, new = make_states(dtype)
    save_file(old, tmp_path / "old.safetensors")

    measured = measure(RIVALS[name], old, tmp_path / "old.safetensors", new)

    assert measured.size > 0


def test_what_loses_a_bit_is_named_in_the_row(tmp_path: Path) -> None:
    class Lossy(Safetensors):
        def decode(self) -> State:
            return {name: tensor + 0 for name, tensor in super().decode().items()}

    old, new = make_states(torch.bfloat16)
    old_file = tmp_path / "step0.safetensors"
    save_file(old, old_file)

    with pytest.raises(AssertionError, match="row was read back with other bits"):
        measure(Lossy, old, old_file, new)


def test_a_rival_that_is_not_installed_gets_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing(Safetensors):
        package = "no-such-distribution"

        def encode(self, new: State) -> int:
            raise ModuleNotFoundError("no_such_distribution")

    monkeypatch.setitem(RIVALS, "missing", Missing)
    old, new = make_states(torch.bfloat16)
    save_file(old, tmp_path / "old.safetensors")
    row = Row(
        model="model",
        regime="lora",
        pair="0→1",
        states="digest",
        rival="missing",
        version=version_of(Missing),
        full=1,
    )

    row = fill(row, tmp_path / "old.safetensors", old, new)

    assert (row.exact, row.version) == (False, "not installed")
    assert "no_such_distribution" in row.reason


def test_the_store_is_measured_by_all_its_files(tmp_path: Path) -> None:
    old, new = make_states(torch.bfloat16)
    save_file(old, tmp_path / "old.safetensors")
    rival = OurStore(tmp_path)
    rival.prepare(old, tmp_path / "old.safetensors")
    before = sum(files_of(tmp_path).values())

    size = rival.encode(new)

    assert sum(files_of(tmp_path).values()) - before == size == sum(rival.parts.values())
    assert all(part > 0 for part in rival.parts.values())


def test_blocks_that_the_reader_has_cost_nothing(tmp_path: Path) -> None:
    state = {"a": torch.randn(5 * BLOCK // 4)}
    blocks = Blocks(tmp_path)
    blocks.prepare(state, tmp_path)
    changed = {"a": state["a"].clone()}
    changed["a"][7] += 1

    assert blocks.encode(state) == 0
    assert blocks.encode(changed) == BLOCK


def test_blocks_cut_by_content_find_what_moved(tmp_path: Path) -> None:
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 8 * BLOCK, np.uint8))
    moved = {"a": torch.cat([torch.tensor([1], dtype=torch.uint8), data])}
    added = {}
    for rival in (Blocks, CutByContent):
        one = rival(tmp_path)
        one.prepare({"a": data}, tmp_path)
        added[rival] = one.encode(moved)

    assert added[Blocks] > 7 * BLOCK
    assert added[CutByContent] <= 3 * BLOCK


def test_pairs_are_single_steps_and_ever_longer_ones(tmp_path: Path) -> None:
    for regime, steps in (("bf16-1e-5", (0, 1, 2, 16, 63, 64)), ("lora", (0, 3, 12))):
        (tmp_path / regime).mkdir()
        for step in steps:
            (tmp_path / regime / f"step{step}.safetensors").touch()
    (tmp_path / "base").mkdir()

    found = [(pair.regime, pair.name) for pair in pairs(tmp_path) if pair.model == table.MODEL]

    names = ("0→1", "1→2", "63→64", "0→16", "0→64")
    assert found == [*(("bf16-1e-5", name) for name in names), ("lora", "0→12")]


def make_row(rival: str, size: int, seconds: float, pair: str = "0→1") -> dict[str, Any]:
    return {
        "model": table.MODEL,
        "regime": "masters-1e-5",
        "pair": pair,
        "rival": rival,
        "version": "1.0",
        "full": 1000,
        "size": size,
        "encode": seconds,
        "decode": seconds,
        "exact": True,
        "parts": {"payloads": size - 3, "manifest": 3} if rival == STORE else {},
        "reason": "",
    }


def test_the_text_says_where_the_store_is_larger_or_slower() -> None:
    good = [make_row(STORE, 10, 0.1), make_row(CODEC, 7, 0.1), make_row(ARC, 20, 1.0)]
    bad = [
        make_row(STORE, 30, 0.3, "0→16"),
        make_row(CODEC, 27, 0.3, "0→16"),
        make_row(ARC, 20, 1.0, "0→16"),
    ]

    text = " ".join(table.verdicts(good + bad))

    assert "smallest on 1 of 2 rows, by a factor of 0.67 to 2.00" in text
    assert "0→16: 30 bytes (payloads 27, manifest 3; the codec alone 27), ARC v3" in text
    assert "more than the 0.2 that it shall take on 1 of 2 rows" in text
    assert text.endswith(
        "It is slower on SmolLM2-135M, bf16 snapshots of fp32 masters, lr 1e-5, 0→16."
    )


def test_the_table_has_a_line_for_each_rival() -> None:
    rows = [make_row(STORE, 10, 0.1), make_row(CODEC, 7, 0.1), make_row(ARC, 20, 1.0)]
    failed = make_row("moonclip", 0, 0.0) | {"exact": False, "reason": "ImportError: no wheel"}
    ((_, regime, found),) = table.regimes([*rows, failed])

    header, _, *lines = table.table_of(found).splitlines()

    assert "0→1" in header
    assert table.words(regime) == "bf16 snapshots of fp32 masters, lr 1e-5"
    assert [line.split("|")[1].strip() for line in lines] == [
        STORE,
        CODEC,
        ARC,
        "moonclip 1.0: ImportError: no wheel",
    ]
    assert lines[0].split("|")[2].strip() == "1"
