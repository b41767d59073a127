"""Save a state while Numba's cache is cold, then wait for a line and look again.

Another program takes the place of the interpreter that would compile the loops. Prints "plain" or
"compiled" after each look.

Example::

    python -m tests.support.cold STORE BASE STATE INTERPRETER
"""

from __future__ import annotations

import os
import sys

from safetensors.torch import load_file

from msft_store import Store
from msft_store.codec.compilation import compiled_kernels


def main(path: str, base: str, state: str, interpreter: str) -> None:
    """Save, and say which loops serve before and after a line of input."""
    sys.executable = interpreter
    store = Store.create(path)
    store.save(load_file(state), parent=store.add_base(base))
    print(loops(), flush=True)
    sys.stdin.readline()
    print(loops(), flush=True)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no child", flush=True)


def loops() -> str:
    """Return which loops serve."""
    return "plain" if compiled_kernels() is None else "compiled"


if __name__ == "__main__":
    main(*sys.argv[1:])
