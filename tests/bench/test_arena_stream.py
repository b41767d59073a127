"""The measurement of a stream: real bytes and requests, equal bits, and the figures of the page."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("gguf")
pytest.importorskip("peft")
from bench.arena import stream


@pytest.fixture(autouse=True)
def _no_arc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure without ARC v3, a package that only ``make arena`` installs."""
    monkeypatch.delitem(stream.PEERS, stream.ARC)
    monkeypatch.delitem(stream.ASKED, stream.ARC)


def versions(folder: Path, count: int = 3) -> list[stream.Version]:
    """Measure a few versions of random weights of which few change."""
    torch.manual_seed(0)
    state = {"weight": torch.randn(1 << 16).bfloat16(), "fixed": torch.ones(8).bfloat16()}
    (folder / "base").mkdir()
    save_file(state, folder / "base" / "model.safetensors")
    states = [(0, state)]
    for step in range(1, count + 1):
        now = {name: tensor.clone() for name, tensor in states[-1][1].items()}
        now["weight"][step :: 1 << 10] += 1
        states.append((step, now))
    (folder / "stream").mkdir()
    return list(stream.measure(states, folder / "base", folder / "stream"))


def test_each_version_is_counted_with_all_that_is_read_and_kept(tmp_path) -> None:
    rows = versions(tmp_path)
    place = tmp_path / "stream" / "place"
    latest = next(place.glob("refs/**/*latest*"))

    assert [row.step for row in rows] == [1, 2, 3]
    for row in rows:
        assert row.changed == pytest.approx(100 / (1 << 10), rel=0.02)
        assert row.poll_requests == 1
        assert row.requests == 3  # ref, manifest, pack of changes
        assert row.peers[stream.SPARSE] > (1 << 6) * 6
    assert rows[-1].poll_bytes == latest.stat().st_size
    manifests = sum(path.stat().st_size for path in place.glob("manifests/*"))
    kept = sum(row.kept["manifests"] for row in rows)
    assert 0 < kept < manifests  # the first version is not counted


def test_the_page_compares_with_what_was_asked(tmp_path) -> None:
    rows = versions(tmp_path, 2)
    run = {
        "machine": {"date": "today", "cpu": "a processor", "commit": "0000000"},
        "version": "1111111",
        "products": "in bf16",
        "full": (1 << 17) + 16,
        "versions": [asdict(row) for row in rows],
    }

    text = stream.page({"regimes": {"masters-1e-6": run}})

    fetched = sum(map(stream.all_fetched, rows))
    share = fetched / sum(row.peers[stream.SPARSE] for row in rows)
    assert re.search(rf"fetched a version / sparse safetensors +\| +{share:.3f} \|", text)
    assert "bf16 snapshots of fp32 masters, lr 1e-6" in text
