"""The arena's results as a file, as tables of ``docs/BENCHMARKS.md`` and as a plot.

Every figure comes from the rows that were measured. The text above the tables says on which rows
the store is not the smallest, or takes more than a fifth of ARC v3's processor time.

Example::

    python -m bench.arena.table         # tables and plot again, from bench/results/arena.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.arena.rivals import ARC, CODEC, RIVALS, STORE
from bench.codec import RESULTS
from bench.trajectories import ROOT
from trainer.text import Table

PAGE = ROOT / "docs" / "BENCHMARKS.md"
PLOT = ROOT / "docs" / "arena.svg"
BEGIN, END = "<!-- arena: make arena -->", "<!-- end of arena -->"
MODEL = "SmolLM2-135M"
SMALL_MODELS = ("encoder-22.7M", "causal-lm-2.5M")
SHARE = 0.2
"""The most of ARC v3's processor time that the store shall take."""
NOT_DRAWN = {CODEC, "safetensors", "blocks of 64 KiB", "blocks cut by content (Xet)"}
"""Rows that would lie on those of the store, and those that find nothing to leave out."""
GREY, RED = "#808080", "#d62728"
"""Colours that are read on white and on black: of text, and of ours."""

Row = dict[str, Any]


def words(regime: str) -> str:
    """Return a regime's name in words."""
    if regime == "lora":
        return "LoRA adapter"
    weights, _, lr = regime.partition("-")
    held = {"masters": "bf16 snapshots of fp32 masters"}.get(weights, f"{weights} weights")
    return f"{held}, lr {lr}"


def percent(row: Row) -> float:
    """Return a row's size in percent of the full state."""
    return float(100 * row["size"] / row["full"])


def seconds(row: Row) -> float:
    """Return a row's processor time."""
    return float(row["encode"] + row["decode"])


def regimes(rows: list[Row]) -> Iterator[tuple[str, str, dict[tuple[str, str], Row]]]:
    """Yield models and regimes, the language model first, with their rows by rival and pair."""
    for model in (MODEL, *SMALL_MODELS):
        for regime in sorted({row["regime"] for row in rows if row["model"] == model}):
            yield (
                model,
                regime,
                {
                    (row["rival"], row["pair"]): row
                    for row in rows
                    if (row["model"], row["regime"]) == (model, regime)
                },
            )


def pairs(found: dict[tuple[str, str], Row]) -> list[str]:
    """Return the pairs of a regime: steps to the next first, then ever longer ones."""

    def order(pair: str) -> tuple[bool, int, int]:
        old, new = map(int, pair.split("→"))
        return new - old > 1, new - old, new

    return sorted({pair for _, pair in found}, key=order)


def best_peer(found: dict[tuple[str, str], Row], pair: str) -> Row:
    """Return the row of the smallest rival that is not ours."""
    peers = [found[name, pair] for name in RIVALS if (name, pair) in found]
    return min(
        (row for row in peers if row["exact"] and row["rival"] not in (STORE, CODEC)),
        key=lambda row: row["size"],
    )


def table_of(found: dict[tuple[str, str], Row]) -> str:
    """Return the table of a regime."""
    columns = pairs(found)
    lines = []
    for name in RIVALS:
        rows = [found[name, pair] for pair in columns if (name, pair) in found]
        good = [row for row in rows if row["exact"]]
        if not rows:
            continue
        if not good:
            why = f"{name} {rows[0]['version']}: {rows[0]['reason']}"
            lines.append((why, *("-" for _ in columns), "-", "-", "no"))
            continue
        sizes = {row["pair"]: f"{percent(row):.3g}" for row in good}
        times = (sum(row[key] for row in good) / len(good) for key in ("encode", "decode"))
        cells = (sizes.get(pair, "-") for pair in columns)
        exact = "yes" if len(good) == len(rows) else f"{len(good)} of {len(rows)}"
        lines.append((name, *cells, *(f"{time:.2g}" for time in times), exact))
    header = ("% of full, by steps", *columns, "encode s", "decode s", "exact")
    return Table(header=header, rows=lines).to_markdown()


def verdicts(rows: list[Row]) -> list[str]:
    """Return where the store is not the smallest, and where it is slow, in sentences."""
    larger: list[str] = []
    slower: list[str] = []
    gains: list[float] = []
    shares: list[float] = []
    for model, regime, found in regimes(rows):
        for pair in pairs(found):
            if not {(name, pair) for name in (STORE, CODEC, ARC)} <= found.keys():
                continue
            ours, peer = found[STORE, pair], best_peer(found, pair)
            where = f"{model}, {words(regime)}, {pair}"
            gains.append(peer["size"] / ours["size"])
            if ours["size"] > peer["size"]:
                parts = ", ".join(f"{name} {size:,}" for name, size in ours["parts"].items())
                larger.append(
                    f"{where}: {ours['size']:,} bytes ({parts}; the codec alone "
                    f"{found[CODEC, pair]['size']:,}), {peer['rival']} {peer['size']:,}"
                )
            if not found[ARC, pair]["exact"]:
                continue
            shares.append(seconds(ours) / seconds(found[ARC, pair]))
            if shares[-1] > SHARE:
                slower.append(where)
    sentences = [
        f"The store with all its files is the smallest on {len(gains) - len(larger)} of "
        f"{len(gains)} rows, by a factor of {min(gains):.2f} to {max(gains):.2f} to the next."
    ]
    if larger:
        sentences.append(f"It is larger on {'; on '.join(larger)}.")
    sentences.append(
        f"It takes {min(shares):.2f} to {max(shares):.2f} of ARC v3's processor time, and more than"
        f" the {SHARE} that it shall take on {len(slower)} of {len(shares)} rows."
    )
    if slower:
        sentences.append(f"It is slower on {'; on '.join(slower)}.")
    return sentences


def page(document: dict[str, Any]) -> str:
    """Return the results as text for ``docs/BENCHMARKS.md``."""
    rows = document["rows"]
    versions = {
        kind.package: row["version"]
        for row in rows
        if (kind := RIVALS[row["rival"]]).package is not None
    }
    installed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    ours = next(row["version"] for row in rows if row["rival"] == STORE)
    tables = [
        f"### {model}: {words(regime)}\n\n{table_of(found)}\n"
        for model, regime, found in regimes(rows)
    ]
    about = (
        f"{document['date']}, one of {document['cores']} shared cores of {document['cpu']}, "
        f"measured at commit {document['commit']} (package of commit {ours}); {installed}."
    )
    picture = f"![Sizes by regime and steps]({PLOT.name})"
    return "\n".join([about, "", " ".join(verdicts(rows)), "", picture, "", *tables]).strip()


def plot(rows: list[Row], path: Path) -> None:
    """Draw the sizes of the language model's checkpoints, one panel a regime."""
    found = [(regime, rows_of) for model, regime, rows_of in regimes(rows) if model == MODEL]
    if not found:
        return
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "arena",
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY
        ),
    }
    with mpl.rc_context(style):
        across = min(3, len(found))
        down = -(-len(found) // across)
        figure = Figure(figsize=(4 * across, 3 * down + 1), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        others = [
            colour for colour in mpl.color_sequences["tab10"] if mpl.colors.to_hex(colour) != RED
        ]
        colours = [RED, *others]
        drawn = [name for name in RIVALS if name not in NOT_DRAWN]
        for axis in list(grid.flat)[len(found) :]:
            axis.remove()
        for (regime, rows_of), axis in zip(found, grid.flat, strict=False):
            columns = pairs(rows_of)
            for at, name in enumerate(drawn):
                have = [p for p in columns if rows_of.get((name, p), {}).get("exact")]
                axis.plot(
                    [columns.index(pair) for pair in have],
                    [percent(rows_of[name, pair]) for pair in have],
                    marker="o",
                    markersize=6 if name == STORE else 3,
                    linewidth=2.5 if name == STORE else 0.8,
                    color=colours[at],
                    label=name,
                )
            axis.set_xticks(range(len(columns)), columns)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_title(words(regime), fontsize=9)
            axis.set_ylabel("% of full")
            axis.patch.set_alpha(0)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False
        )
        figure.savefig(path, transparent=True, metadata={"Date": None})


def write(document: dict[str, Any], rows: list[Row]) -> None:
    """Write the results, a row a line."""
    head = json.dumps(document, ensure_ascii=False, indent=1).removesuffix("\n}")
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    scratch = RESULTS / "arena.tmp"
    scratch.write_text(f'{head},\n "rows": [\n{body}\n]}}\n', encoding="utf-8")
    scratch.replace(RESULTS / "arena.json")


def render() -> None:
    """Renew tables and plot from the results."""
    document = json.loads((RESULTS / "arena.json").read_text(encoding="utf-8"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = re.sub(r" +$", "", page(document), flags=re.MULTILINE)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    plot(document["rows"], PLOT)


if __name__ == "__main__":
    render()
