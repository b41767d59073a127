"""A sweep over the checkpoints of a run, beside a load of each of them.

The run is synthetic: normal weights of 67 M parameters in bf16, whose float32 masters take a random
step a checkpoint, so that about 1.2 % of the weights change between two. Each checkpoint is loaded
into zeros with ``load_into``, and then reached in the sweep from the one before it, in turns.
Seconds are of the processor. Bytes are all that the process reads during the switches, as Linux
counts them; index and manifests are part of it.

Example::

    python -m bench.sweep --checkpoints 150
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.codec import RESULTS, machine
from bench.trajectories import DATA
from msft_store import Store

SUMMARY = "Measure a sweep over the checkpoints of a run beside loads of them."
SIDE, LAYERS = 2048, 16
STEP = 3e-7
"""Standard deviation of a step of a weight, where weights have one of 0.02."""
ABOUT = """\
{cpu}, {date}, commit {commit}. {count} checkpoints of {gigabytes:.3f} GB in bf16, synthetic;
{changed:.2f} % of the weights change between two, {stored:.2f} % of a checkpoint is stored. A load
takes {load:.2f} s of the processor, a switch {switch:.3f} s: {ratio:.2f} times as much in all,
{median:.2f} times at the median. The switches read {read:.2f} times a checkpoint's bytes in all.
"""


def make_store(path: Path, count: int) -> tuple[Store, float]:
    """Return a store with the checkpoints of a run, and the mean share of changed weights."""
    torch.manual_seed(0)
    masters = {f"layer.{at}.weight": 0.02 * torch.randn(SIDE, SIDE) for at in range(LAYERS)}
    store = Store.create(path)
    state = {name: weight.bfloat16() for name, weight in masters.items()}
    last, shares = store.save(state, step=0), []
    for step in range(1, count):
        changed = 0
        for name, weight in masters.items():
            weight.add_(torch.randn_like(weight), alpha=STEP)
            new = weight.bfloat16()
            changed += int((new != state[name]).sum())
            state[name] = new
        shares.append(changed / (LAYERS * SIDE**2))
        last = store.save(state, parent=last, step=step)
    return store, statistics.fmean(shares)


def count_read() -> int:
    """Return the bytes that this process has read so far."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="utf-8"))
    assert found is not None, "only Linux counts the bytes that a process reads"
    return int(found[1])


def measure(store: Store) -> dict[str, float]:
    """Load each checkpoint, and switch to it; return the figures of all."""
    history = sorted(store.log(), key=lambda checkpoint: checkpoint.step or 0)
    entries = store.tensors(history[0])
    loaded = {
        name: torch.zeros(entry.shape, dtype=torch.bfloat16) for name, entry in entries.items()
    }
    swept = {name: torch.zeros_like(tensor) for name, tensor in loaded.items()}
    size = sum(tensor.nbytes for tensor in loaded.values())
    # The first calls compile and import.
    store.load_into(loaded, history[1])
    for _ in store.sweep(swept, history[:2]):
        pass
    for tensor in swept.values():
        tensor.zero_()
    held = store.sweep(swept, history)
    loads, switches, read = [], [], 0
    for checkpoint in history:
        for tensor in loaded.values():
            tensor.zero_()
        loads.append(_seconds(lambda checkpoint=checkpoint: store.load_into(loaded, checkpoint)))
        before = count_read()
        switches.append(_seconds(lambda: next(held)))
        read += count_read() - before
        for name, tensor in swept.items():
            assert torch.equal(tensor.view(torch.int16), loaded[name].view(torch.int16))
    return {
        "count": len(history),
        "gigabytes": size / 1e9,
        "stored": 100 * statistics.fmean(c.stored_bytes for c in history[1:]) / size,
        "load": statistics.fmean(loads),
        "switch": statistics.fmean(switches),
        "ratio": sum(switches) / sum(loads),
        "median": statistics.median(a / b for a, b in zip(switches, loads, strict=True)),
        "read": read / size,
    }


def _seconds(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main() -> None:
    """Measure; write ``bench/results/sweep.md``."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--checkpoints", type=int, default=150)
    parser.add_argument("--print-only", action="store_true", help="write no results")
    options = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA, prefix="sweep-") as folder:
        store, changed = make_store(Path(folder) / "store", options.checkpoints)
        text = ABOUT.format(**machine(), changed=100 * changed, **measure(store))
    print(text)
    if not options.print_only:
        (RESULTS / "sweep.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
