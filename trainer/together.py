"""What the processes of a run tell each other: one decides, all act.

Example::

    together = Together(accelerator)
    decision = together.share(decision)             # the main process's, in every process
    if together.any_of(signalled): ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from trainer.errors import RunError

_T = TypeVar("_T")


def this_process() -> PartialState:
    """Return accelerate's view of the processes; on CPUs it must be told that there are several.

    ``accelerate launch --use_fsdp`` has no option for it, and without it every process would take
    itself for the only one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def is_alone(error: BaseException) -> bool:
    """Return whether an error says that another process of the run has gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def in_turns(
    items: Sequence[_T], accelerator: Accelerator, *, alike: bool
) -> Iterator[tuple[_T, bool]]:
    """Yield this process's share of items, and whether each is its own.

    ``alike``: every process gets as many, the last one maybe another's, for a model that they have
    only together.
    """
    count, rank = accelerator.num_processes, accelerator.process_index
    for item in items[rank::count]:
        yield item, True
    rest = len(items) % count
    if alike and 0 < rest <= rank:
        yield items[0], False


class Together:
    """The processes of a run."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Prepare; all processes then make the same calls in the same order."""
        self._accelerator = accelerator
        self.is_one = accelerator.num_processes == 1

    def share(self, value: Any) -> Any:
        """Return the main process's value in every process."""
        shared = [value]
        if not self.is_one:
            broadcast_object_list(shared)
        if shared[0] is None:
            raise RunError("the main process has decided nothing")
        return shared[0]

    def any_of(self, flag: bool) -> bool:
        """Return whether any process has the flag, the same in all of them."""
        if self.is_one:
            return flag
        number = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(number, reduction="sum") > 0)
