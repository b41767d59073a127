"""Make the table of figures in ``docs/BENCHMARKS.md`` from ``bench/results/``.

Every figure was measured and written by a benchmark; none is typed by hand. The table stands
between two comments on the page, and a test compares it with the results.

Example::

    python -m bench.headline            # print the table
    python -m bench.headline --write    # write it into docs/BENCHMARKS.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.codec import RESULTS, TENSORX
from bench.loading import ROLLBACK
from bench.trajectories import ROOT

PAGE = ROOT / "docs" / "BENCHMARKS.md"
BEGIN, END = "<!-- figures: python -m bench.headline --write -->", "<!-- end of figures -->"
ENCODER = "encoder-22.7M"
FAST, SMALL = "ours, fast", "ours, small"
"""The names that the codec has in its results, which were measured while it had two levels."""
REGIMES = {
    "bf16-1e-5": "bf16, lr 1e-5",
    "bf16-5e-5": "bf16, lr 5e-5",
    "masters-2e-5": "bf16 snapshots of fp32 masters, lr 2e-5",
    "fp32-2e-5": "fp32, lr 2e-5",
}
WINDOW = 4
BUDGETS = (1, 3, 10)


def table(results: Path = RESULTS) -> str:
    """Return the table."""
    codec, store, disk, arena_msft, loading = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("codec", "store", "disk", "arena_msft", "loading")
    )
    lines = ["| | ours | beside it |", "|---|--:|--:|"]
    rows = (*codecs(codec), *times(store), *loads(loading), pretrained_run(arena_msft), *runs(disk))
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    about = (
        f"{codec['date']}, {store['cores']} shared cores of {codec['cpu']}: codecs on one of them "
        f"(commit {codec['commit']}), saves on a disk that writes {store['disk']:.2f} GB/s "
        f"(commit {store['machine']['commit']}), whole runs at commit {disk['commit']}, that of "
        f"SmolLM2-135M on {arena_msft['date']} at commit {arena_msft['commit']}. Sizes and speeds "
        "are of an encoder of 22.7 M parameters, runs of 10 sub-datasets of a causal LM of 2.5 M. "
        "`bench/results` and [the log](LOG.md) have more figures, and those that miss their target."
    )
    return "\n".join([*lines, "", about])


def codecs(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of sizes and speeds, of the encoder's checkpoints."""
    rows = {(row["trajectory"], row["codec"]): row for row in document["rows"]}
    found = []
    for regime, words in REGIMES.items():
        fast, small, peer = (rows[f"{ENCODER} {regime}", name] for name in (FAST, SMALL, TENSORX))
        found.append(
            (
                f"a checkpoint against its base, {words}; `fast` (`small`)",
                f"{fast['percent']:.3g} % ({small['percent']:.3g} %) of full",
                f"{peer['percent']:.3g} %, XOR + planes + zstd-1",
            )
        )
    fast, small = (rows[f"{ENCODER} bf16-1e-5", name] for name in (FAST, SMALL))
    peer = rows[f"{ENCODER} bf16-1e-5", TENSORX]
    found.append(
        (
            "encoding, decoding at lr 1e-5; `fast` (`small`)",
            f"{fast['encode']:.1f}, {fast['decode']:.1f} ({small['encode']:.1f}, "
            f"{small['decode']:.1f}) GB/s",
            f"{peer['encode']:.1f}, {peer['decode']:.1f} GB/s, XOR + planes + zstd-1",
        )
    )
    alone = {(row["trajectory"], row["codec"]): row for row in document["alone"]}
    ours = alone[f"{ENCODER} bf16", FAST]
    peer = alone.get((f"{ENCODER} bf16", "ZipNN")) or alone[f"{ENCODER} bf16", "zstd-3"]
    found.append(
        (
            "bf16 weights without any base",
            f"{ours['percent']:.3g} % of full; {ours['encode']:.1f}, {ours['decode']:.1f} GB/s",
            f"{peer['percent']:.3g} %; {peer['encode']:.1f}, {peer['decode']:.1f} GB/s, "
            f"{peer['codec']}",
        )
    )
    return found


def times(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of saves."""
    rows = {(row["regime"], row["way"]): row for row in document["rows"]}
    found = []
    for regime, words in REGIMES.items():
        ours, peer = rows[regime, "ours"], rows[regime, "safetensors"]
        found.append(
            (
                f"a durable save, {words}",
                f"{ours['save'] / peer['save']:.2f} of the time",
                "safetensors and fsync",
            )
        )
    return found


def pretrained_run(document: dict[str, Any]) -> tuple[str, str, str]:
    """Return the row of the MSFT run of the pretrained language model."""
    run = document["run"]
    return (
        f"disk of a whole MSFT run of SmolLM2-135M on {run['sub_datasets']} sub-datasets of real "
        "text, bf16, lr 1e-5, C = 1, no peak window; peak (mean), in full checkpoints",
        f"{run['peak']:.3f} ({run['mean']:.3f})",
        f"{run['paper_peak']} ({run['paper_mean']:.2f}), a full copy per champion",
    )


def loads(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of loads into existing tensors."""
    about = document["machine"]
    where = f"{document['data']}, {about['date']}, commit {about['commit']}"
    speeds = {
        (row["regime"], row["depth"]): {
            way: row["gigabytes"] / seconds for way, seconds in row["seconds"].items()
        }
        for row in document["rows"]
        if row["cores"] == 1
    }
    found = []
    for regime in dict.fromkeys(regime for regime, _ in speeds):
        depths = sorted(depth for name, depth in speeds if name == regime)
        near, far = speeds[regime, depths[0]], speeds[regime, depths[-1]]
        found.append(
            (
                f"a load in place, {regime}, depth {depths[0]} ({depths[-1]}); {where}",
                f"{near['ours']:.2f} ({far['ours']:.2f}) GB/s of processor time; "
                f"{near[ROLLBACK]:.2f} ({far[ROLLBACK]:.2f}) where 1 % of the chunks differ",
                f"{near['safetensors']:.2f} GB/s, safetensors; "
                f"{near['safetensors, verified']:.2f} with digests",
            )
        )
    return found


def runs(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of whole MSFT runs."""
    rows = {(row["regime"], row["budget"], row["window"]): row for row in document["rows"]}
    found = []
    for regime, window in (("bf16-1e-5", None), ("bf16-1e-5", WINDOW), ("masters-2e-5", WINDOW)):
        budgets = [budget for budget in BUDGETS if (regime, budget, window) in rows]
        chosen = [rows[regime, budget, window] for budget in budgets]
        what = "no peak window" if window is None else f"peak window {window}"
        found.append(
            (
                f"disk of a whole MSFT run of 10 sub-datasets, {REGIMES[regime]}, C = "
                f"{', '.join(map(str, budgets))}, {what}; peak (mean), in full checkpoints",
                ", ".join(f"{row['peak']:.2f} ({row['mean']:.2f})" for row in chosen),
                ", ".join(f"{row['paper_peak']} ({row['paper_mean']:.2f})" for row in chosen)
                + ", a full copy per champion",
            )
        )
    return found


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description="Make the table of figures in docs/BENCHMARKS.md.")
    parser.add_argument("--write", action="store_true", help="write it into docs/BENCHMARKS.md")
    if not parser.parse_args().write:
        print(table())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
