"""The entry point of ``msft-train`` and of ``python -m trainer``.

If a package that the trainer needs is missing, its message names the extra to install.

Example::

    sys.exit(main())
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

_OWN = ("trainer", "msft_store")


def main() -> int:
    """Run the command and return its exit code, which is 1 if a package is missing.

    ``--version`` imports nothing else, so it is fast and needs no other package.
    """
    if sys.argv[1:] == ["--version"]:
        print(version("msft-store"))
        return 0
    try:
        cli = importlib.import_module("trainer.cli.main")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OWN or not missing:
            raise
        print(
            f"msft-train: {missing} is not installed: pip install 'msft-store[trainer]'",
            file=sys.stderr,
        )
        return 1
    code: int = cli.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
