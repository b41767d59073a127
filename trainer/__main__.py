"""The entry point of ``msft-train`` and of ``python -m trainer``.

It names the extra to install when a package that the trainer needs is missing.

Example::

    sys.exit(main())
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

_OWN = ("trainer", "msft_store")


def main() -> int:
    """Run the command; return its exit code, 1 if what the trainer needs is not installed.

    The version is told at once, and where nothing is installed.
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
