"""Run an action in real processes of one gloo group, forked from a test.

Example::

    codes = in_ranks(2, lambda rank: dcp.save(...), tmp_path)
    assert codes == [0, 0]
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.children import begin, end_of

_TIMEOUT = datetime.timedelta(seconds=60)


def in_ranks(count: int, action: Callable[[int], object], folder: Path) -> list[int]:
    """Run ``action(rank)`` in ``count`` processes of a group; return their exit codes by rank."""
    rendezvous = folder / f"rendezvous-{uuid.uuid4().hex}"

    def work(rank: int) -> int:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=count,
            timeout=_TIMEOUT,
        )
        action(rank)
        dist.barrier()
        dist.destroy_process_group()
        return 0

    def bind_rank(rank: int) -> Callable[[], int]:
        return lambda: work(rank)

    children = [begin(bind_rank(rank)) for rank in range(count)]
    return [end_of(child) for child in children]
