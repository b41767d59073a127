"""Let ckpt-chaos, a tool of others, kill trainings at their file events and judge the resume.

ckpt-chaos (PyPI) runs a command, kills a copy of it at each file event, resumes it and compares
what is left with an undisturbed run. It kills before a file is created, renamed or removed, with
the file cut in half, with everything lost that was not synced, and by SIGTERM. Two commands are
tried:

- ``trainer``: :mod:`tests.support.stopped_training`, a Hugging Face Trainer with ``StoreCallback``.
  A resume from an older step than the last save that was announced counts as lost work.
- ``msft-train``: ``msft-train run`` with roll-backs and resume points, then ``msft-train resume``.

Imports would take most of the time. So this process forks after its imports, and arms ckpt-chaos in
each fork as ckpt-chaos does in a new interpreter. The exit code is 0 if all points pass.

Example::

    pip install ckpt-chaos
    python -m tests.reliability.chaos                           # both, at all events
    python -m tests.reliability.chaos trainer --max-points 40 --jobs 2
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
import tqdm
from accelerate.state import AcceleratorState
from ckpt_chaos.targets.common import arm_from_env

from tests.support import runs
from tests.support.stopped_training import train
from tests.support.tiny_runs import make_config
from tests.support.trainers import make_model
from trainer.cli.main import main as msft_train

ASK = Path(__file__).parents[1] / "support" / "ask.py"
OPTIONS = (
    *("--modes", "before,torn,unsynced,term", "--max-points", "2000"),
    *("--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"),
)


def trainer_options(folder: Path, ask: str) -> list[str]:
    """Return the options of ckpt-chaos and the command for the Trainer."""
    return [
        *("--step-regex", r"resumes from step (\d+)", "--checkpoint-glob", "{out}/saved-*"),
        *("--result-cmd", f"{ask} left_by_trainer {{out}}"),
        *("--", *ask.split(), "train", "{out}", str(folder / "base")),
    ]


def command_options(folder: Path, ask: str) -> list[str]:
    """Return the options of ckpt-chaos and the command for ``msft-train``."""
    place = folder / "mixture"
    place.mkdir()
    make_config(place, train__lr=0.02, log_every=1, resume_every=4, msft__max_stages=2)
    run = f"{ask} run {place / 'config.yaml'} output_dir={{out}} --quiet"
    # A run that was killed before it wrote its configuration has not begun.
    go_on = f"if [ -e {{out}}/config.yaml ]; then {ask} resume {{out}} --quiet; else {run}; fi"
    result = f"{ask} left_by_run {{out}}"
    return ["--resume-cmd", f'sh -c "{go_on}"', "--result-cmd", result, "--", *run.split()]


WORKLOADS = {"trainer": trainer_options, "msft-train": command_options}


def main(arguments: list[str]) -> int:
    """Try one command or both; further arguments are options of ``ckpt-chaos run``."""
    chosen = [name for name in arguments[:1] if name in WORKLOADS]
    codes = []
    for name in chosen or WORKLOADS:
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
        print(f"{name}, in {folder}", flush=True)
        prepare(folder)
        ask = f"{sys.executable} -I {ASK} {folder / 'socket'}"
        own = [*OPTIONS, "--work", str(folder / "work"), *arguments[len(chosen) :]]
        command = [sys.executable, "-m", "ckpt_chaos", "run", *own, *WORKLOADS[name](folder, ask)]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            codes.append(serve(listener, subprocess.Popen(command)))
    return max(codes)


def prepare(folder: Path) -> None:
    """Write the base and train once, so that the forks find everything loaded."""
    torch.set_num_threads(1)
    # The default lock is shared with the forks, and a killed one would never release it.
    tqdm.tqdm.set_lock(threading.RLock())
    for base in (folder / "base", folder / "unused"):
        make_model().float().save_pretrained(base)
    train(folder / "first", folder / "unused")
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    gc.freeze()


def serve(listener: socket.socket, chaos: subprocess.Popen[bytes]) -> int:
    """Fork a process for each job until ckpt-chaos ends; return its exit code."""
    children: list[int] = []
    while chaos.poll() is None:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        if select.select([listener], [], [], 0.1)[0]:
            client, _ = listener.accept()
            children.append(os.fork())
            if children[-1] == 0:
                work(client)
            client.close()
    return chaos.returncode


def work(client: socket.socket) -> None:
    """Do one job in this process, tell the client the exit code, and end."""
    content, outputs, *_ = socket.recv_fds(client, 1 << 20, 2)
    job = json.loads(content)
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(output, descriptor)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(job["environment"])
        arm_from_env(0, lazy=True)
        match job["arguments"]:
            case ["train", out, base]:
                train(Path(out), Path(base))
                code = 0
            case ["left_by_trainer" | "left_by_run" as function, out]:
                print(getattr(runs, function)(out))
                code = 0
            case command:
                code = msft_train(command)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    client.sendall(str(code).encode())
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
