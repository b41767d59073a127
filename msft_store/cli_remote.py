"""``msft-store push``, ``pull`` and ``clone``: what they print, and stores that are read in place.

Example::

    store = open_store("s3://bucket/run")
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from msft_store.integrations.addresses import is_url
from msft_store.integrations.remote import clone, open_remote, pull, push
from msft_store.integrations.tally import Transfer
from msft_store.store import Store

Output = tuple[Any, str]
Add = Callable[[str, Callable[[argparse.Namespace], Output], str, str], argparse.ArgumentParser]
"""Adds a command: name, what runs it, one line about it, an example."""


def open_store(path: str) -> Store:
    """Open a store at a path, or one at a URL to be read."""
    return open_remote(path) if is_url(path) else Store.open(path)


def add_commands(add: Add, path_of: Callable[[argparse.Namespace], str]) -> None:
    """Add the commands; ``path_of`` gives the store's path of what was typed."""

    def _push(options: argparse.Namespace) -> Output:
        return _output(
            push(
                path_of(options),
                options.url,
                with_base=options.with_base,
                force=options.force,
                timelines=options.timelines,
            )
        )

    def _pull(options: argparse.Namespace) -> Output:
        return _output(
            pull(
                path_of(options),
                options.url,
                with_base=options.with_base,
                base_directory=options.base_directory,
                force=options.force,
                timelines=options.timelines,
            )
        )

    def _clone(options: argparse.Namespace) -> Output:
        return _output(
            clone(
                options.url,
                options.directory,
                with_base=options.with_base,
                base_directory=options.base_directory,
                timelines=options.timelines,
            )
        )

    url = "s3://…, gs://…, az://…, file:///…, any other that fsspec knows, or a directory"
    command = add(
        "push",
        _push,
        "send what an object store, or another place, lacks of the store",
        "push s3://bucket/run --with-base",
    )
    command.add_argument("url", help=url)
    command.add_argument("--force", action="store_true", help="move refs that others moved there")
    _common(command, "send the files of the base models, too")

    command = add(
        "pull",
        _pull,
        "fetch what the store lacks of another place",
        "pull s3://bucket/run",
    )
    command.add_argument("url", help=url)
    command.add_argument("--force", action="store_true", help="move refs that were moved here")
    _common(command, "fetch the files of base models that are not on this machine, too")
    _base_directory(command)

    command = add(
        "clone",
        _clone,
        "make a store of what is in another place; repeated, it goes on",
        "clone s3://bucket/run run/store --with-base",
    )
    command.add_argument("url", help=url)
    command.add_argument("directory", help="a new or empty directory, or a clone that was cut off")
    _common(command, "fetch the files of the base models, too")
    _base_directory(command)


def _common(command: argparse.ArgumentParser, with_base: str) -> None:
    command.add_argument("--with-base", action="store_true", help=with_base)
    command.add_argument(
        "--timelines",
        action="store_true",
        help="with the refs of timelines, to move a run to another machine",
    )


def _base_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base-directory",
        metavar="DIRECTORY",
        help="where the files of base models go (default: STORE-bases, beside the store)",
    )


def _output(done: Transfer) -> Output:
    return done, str(done)
