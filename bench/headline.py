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

from bench.arena.rivals import ARC, CODEC, STORE
from bench.arena.table import MODEL, best_peer, pairs, percent, regimes, seconds, words
from bench.codec import RESULTS
from bench.loading import ROLLBACK
from bench.trajectories import ROOT

PAGE = ROOT / "docs" / "BENCHMARKS.md"
BEGIN, END = "<!-- figures: python -m bench.headline --write -->", "<!-- end of figures -->"
ENCODER = "encoder-22.7M"
CHECKPOINTS = {
    MODEL: ("bf16-1e-5", "bf16-2e-5", "masters-1e-6", "masters-1e-5", "masters-2e-5", "lora"),
    ENCODER: ("bf16-5e-5", "fp32-2e-5"),
}
"""The regimes of the arena in the table; of each, the last checkpoint."""
SAVES = ("bf16-1e-5", "bf16-5e-5", "masters-2e-5", "fp32-2e-5")
"""The regimes of the saves in the table."""
PRETRAINED = {
    "bf16-1e-5": "bf16, lr 1e-5",
    "masters-1e-6": "bf16 snapshots of fp32 masters, lr 1e-6",
    "masters-1e-5": "bf16 snapshots of fp32 masters, lr 1e-5",
}
ON_BASE = "against the base"
WINDOW = 4
BUDGETS = (1, 3, 10)


def table(results: Path = RESULTS) -> str:
    """Return the table."""
    arena, codec, store, saving, disk, arena_msft, loading = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("arena", "codec", "store", "saving", "disk", "arena_msft", "loading")
    )
    lines = ["| | ours | beside it |", "|---|--:|--:|"]
    rows = (
        *checkpoints(arena),
        *alone(codec),
        *times(store),
        *pretrained_saves(saving),
        *loads(loading),
        pretrained_run(arena_msft),
        *runs(disk),
    )
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    about = (
        f"Checkpoints: {arena['date']}, one of {arena['cores']} shared cores of {arena['cpu']}, "
        f"commit {arena['commit']}; the run of SmolLM2-135M: {arena_msft['date']}, commit "
        f"{arena_msft['commit']}. The others: {codec['date']}, {store['cores']} shared cores of "
        f"{codec['cpu']}; weights without a base on one of them, commit {codec['commit']}; saves "
        f"on a disk of {store['disk']:.2f} GB/s, commit {store['machine']['commit']}; whole runs "
        f"at commit {disk['commit']}; saves of SmolLM2-135M: {saving['machine']['date']}, "
        f"{saving['cores']} shared cores of "
        f"{saving['machine']['cpu']}, commit {saving['machine']['commit']}. Other saves "
        "and weights without a base are of an encoder of 22.7 M parameters, runs of 10 "
        "sub-datasets of a causal LM of 2.5 M. `bench/results` and "
        "[the log](LOG.md) have more figures, and those that miss their target."
    )
    return "\n".join([*lines, "", about])


def checkpoints(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of checkpoints against their base, with all files of the store."""
    found = []
    for model, regime, rows in regimes(document["rows"]):
        if regime not in CHECKPOINTS.get(model, ()):
            continue
        pair = pairs(rows)[-1]
        ours, peer = rows[STORE, pair], best_peer(rows, pair)
        found.append(
            (
                f"a checkpoint of {model}, {words(regime)}, after {pair.partition('→')[2]} steps",
                f"{percent(ours):.3g} % of full",
                f"{percent(peer):.3g} %, {peer['rival']}",
            )
        )
        if len(found) == 1:
            codec, arc = rows[CODEC, pair], rows[ARC, pair]
            found.append(
                (
                    "processor time to write it and to read it; the codec alone",
                    f"{seconds(ours):.2g} s; {seconds(codec):.2g} s",
                    f"{seconds(arc):.2g} s, ARC v3",
                )
            )
    return found


def alone(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the row of the encoder's weights without any base."""
    trajectory = f"{ENCODER} bf16"
    rows = {row["codec"]: row for row in document["alone"] if row["trajectory"] == trajectory}
    ours = next(row for name, row in rows.items() if name.startswith("ours"))
    peer = rows.get("ZipNN") or rows["zstd-3"]
    cells = (
        f"{row['percent']:.3g} %{of}; {row['encode']:.1f}, {row['decode']:.1f} GB/s"
        for row, of in ((ours, " of full"), (peer, ""))
    )
    what = "bf16 weights without any base; encoding, decoding"
    mine, theirs = cells
    return [(what, mine, f"{theirs}, {peer['codec']}")]


def times(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of saves."""
    rows = {(row["regime"], row["way"]): row for row in document["rows"]}
    found = []
    for regime in SAVES:
        ours, peer = rows[regime, "ours"], rows[regime, "safetensors"]
        found.append(
            (
                f"a durable save, {words(regime)}",
                f"{ours['save'] / peer['save']:.2f} of the time",
                "safetensors and fsync",
            )
        )
    return found


def pretrained_saves(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of saves of the pretrained language model, on two threads."""
    found = []
    for regime, name in PRETRAINED.items():
        rows = [
            row
            for row in document["rows"]
            if (row["trajectory"], row["threads"], row["way"]) == (regime, 2, ON_BASE)
        ]
        if rows:
            steps = " and ".join(str(row["step"]) for row in rows)
            times, cpu = (
                ", ".join(f"{row[key]:.2f}" for row in rows) for key in ("ratio", "cpu_ratio")
            )
            found.append(
                (
                    f"a durable save of SmolLM2-135M, {name}, after steps {steps}",
                    f"{times} of the time; {cpu} of the processor's time",
                    "safetensors and fsync",
                )
            )
    return found


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


def pretrained_run(document: dict[str, Any]) -> tuple[str, str, str]:
    """Return the row of the MSFT run of the pretrained language model."""
    run = document["run"]
    return (
        f"disk of a whole MSFT run of SmolLM2-135M on {run['sub_datasets']} sub-datasets of real "
        "text, bf16, lr 1e-5, C = 1, no peak window; peak (mean), in full checkpoints",
        f"{run['peak']:.3f} ({run['mean']:.3f})",
        f"{run['paper_peak']} ({run['paper_mean']:.2f}), a full copy per champion",
    )


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
                f"disk of a whole MSFT run of 10 sub-datasets, {words(regime)}, C = "
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
