"""``msft-store push``, ``pull`` and ``clone``: what they print, and stores that are read in place.

Example::

    store = open_store("s3://bucket/run")
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from msft_store.cli.progress import line
from msft_store.errors import InvalidInputError
from msft_store.objects.catalog import CONFIG
from msft_store.objects.manifest import MANIFESTS
from msft_store.remote.api import clone, open_remote, pull, push
from msft_store.remote.transfer import Progress
from msft_store.remote.transport.url import is_url
from msft_store.store import Store

TRANSFERS = ("push", "pull", "clone")
Output = tuple[Any, str]
Add = Callable[[str, Callable[[argparse.Namespace], Output], str, str], argparse.ArgumentParser]
"""Adds a command: name, what runs it, one line about it, an example."""


def open_store(path: str) -> Store:
    """Open a store at a path, or one at a URL to be read."""
    return open_remote(path) if is_url(path) else Store.open(path)


def add_commands(add: Add, path_of: Callable[[argparse.Namespace], str]) -> None:
    """Add the commands; ``path_of`` gives the store's path of what was typed."""

    def _push(options: argparse.Namespace) -> Output:
        store = _source(options, path_of)
        with _line(options) as progress:
            done = push(
                store,
                options.url,
                with_base=options.with_base,
                force=options.force,
                timelines=options.timelines,
                progress=progress,
            )
        return done, str(done)

    def _pull(options: argparse.Namespace) -> Output:
        store = _source(options, path_of)
        with _line(options) as progress:
            done = pull(
                store,
                options.url,
                with_base=options.with_base,
                base_directory=options.base_directory,
                force=options.force,
                timelines=options.timelines,
                progress=progress,
            )
        return done, str(done)

    def _clone(options: argparse.Namespace) -> Output:
        url, directory = options.url, options.directory
        # As push and pull have them: the store, then the URL.
        if is_url(directory) and not is_url(url):
            url, directory = directory, url
        with _line(options) as progress:
            done = clone(
                url,
                directory,
                with_base=options.with_base,
                base_directory=options.base_directory,
                timelines=options.timelines,
                progress=progress,
            )
        return done, str(done)

    url = "s3://…, gs://…, az://…, file:///…, any other that fsspec knows, or a directory"
    command = add(
        "push",
        _push,
        "send what an object store, or another place, lacks of the store",
        "push run/store s3://bucket/run --with-base",
    )
    _store(command)
    command.add_argument("url", help=url)
    command.add_argument("--force", action="store_true", help="move refs that others moved there")
    _common(command, "send the files of the base models, too")

    command = add(
        "pull",
        _pull,
        "fetch what the store lacks of another place",
        "pull run/store s3://bucket/run",
    )
    _store(command)
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


def _store(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "place", metavar="STORE", nargs="?", help="the store's directory; the same as --store"
    )


def _source(options: argparse.Namespace, path_of: Callable[[argparse.Namespace], str]) -> str:
    """Return the path of the store that is pushed, or pulled to."""
    if options.place is None:
        path = path_of(options)
        if path == os.curdir and not any(map(os.path.lexists, (CONFIG, MANIFESTS))):
            store, url = ("STORE", options.url) if is_url(options.url) else (options.url, "URL")
            raise InvalidInputError(
                "no store in the current directory; say both, where the store is and where the "
                f"other place is: msft-store {options.name} {store} {url}"
            )
        return path
    if getattr(options, "store", options.place) != options.place:
        raise InvalidInputError(
            f"two stores are given, {options.place} and --store {options.store}: leave one out"
        )
    if is_url(options.place) and not is_url(options.url):
        raise InvalidInputError(
            f"the store comes first, then the URL: msft-store {options.name} {options.url} "
            f"{options.place}"
        )
    return str(options.place)


def _line(options: argparse.Namespace) -> AbstractContextManager[Progress | None]:
    return line(wanted=not getattr(options, "json", False))


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
