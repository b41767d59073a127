"""Completion scripts for shells, made by shtab, which is optional.

Example::

    print(completion(parser, "bash"))
"""

from __future__ import annotations

import argparse
import importlib

from msft_store.errors import InvalidInputError

SHELLS = ("bash", "zsh", "tcsh")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes a parser's command in a shell."""
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise InvalidInputError(
            "completion scripts are made by shtab, which is not installed: pip install shtab"
        ) from None
    script: str = shtab.complete(parser, shell=shell)
    return script
