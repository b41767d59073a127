"""Two real processes of one training run, forked from a test.

Example::

    assert together(lambda rank: main(["run", path, "--quiet"]), tmp_path) == {0: 0, 1: 0}
"""

import os
import select
import socket
import sys
import time

from accelerate.state import AcceleratorState

LONG = 60.0
"""Seconds after which a process that hangs fails the test."""
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""The environment variables that ``accelerate launch --use_fsdp --fsdp_version 2`` sets."""


def together(action, errors, environment=None):
    """Run ``action`` in two processes of one run; return their exit codes by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [process(rank, port, action, errors, environment or {}) for rank in (0, 1)]
    codes, deadline = {}, time.monotonic() + LONG
    for rank, child in enumerate(children):
        descriptor = os.pidfd_open(child)
        try:
            left = max(0.0, deadline - time.monotonic())
            ended, _, _ = select.select([descriptor], [], [], left)
        finally:
            os.close(descriptor)
        if not ended:
            for other in children[rank:]:
                os.kill(other, 9)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return codes


def process(rank, port, action, errors, environment):
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sys.stderr = (errors / f"{rank}.txt").open("w", buffering=1)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true", **environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        code = action(rank)
    finally:
        os._exit(code)
