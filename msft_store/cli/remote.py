"""``msft-store push``, ``pull`` and ``clone``, and the store that the options name.

Example::

    store = open_store(options)             # the directory or URL of --store
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from msft_store.cli.progress import progress_bar
from msft_store.errors import InvalidInputError
from msft_store.objects.catalog import CONFIG
from msft_store.objects.manifest import MANIFESTS
from msft_store.remote.api import clone, pull, push
from msft_store.remote.transfer import Transfer
from msft_store.remote.transport.url import is_url
from msft_store.store import Store, open_remote

TRANSFERS = ("push", "pull", "clone")
STORE_VARIABLE = "MSFT_STORE"
_KEYWORDS = ("with_base", "base_directory", "force", "timelines")
_URL_HELP = "s3://…, gs://…, az://…, file:///…, any other URL of fsspec, or a directory"

Output = tuple[Any, str]
"""The result of a command as a document for ``--json``, and as text for people."""
Add = Callable[[str, Callable[..., Output], str, str], argparse.ArgumentParser]
"""Adds a command: its name, function, one-line description and example."""


def store_path(options: argparse.Namespace) -> str:
    """Return the path or URL of the store: the option, the environment variable, or "."."""
    return str(getattr(options, "store", None) or os.environ.get(STORE_VARIABLE) or os.curdir)


def open_store(options: argparse.Namespace) -> Store:
    """Open the store in a directory, or for reading at a URL."""
    path = store_path(options)
    return open_remote(path) if is_url(path) else Store.open(path)


def add_transfer_commands(add: Add) -> None:
    """Add ``push``, ``pull`` and ``clone`` to the command."""
    command = add(
        "push",
        partial(_push_or_pull, push),
        "send new files of the store to an object store or another place",
        "push run/store s3://bucket/run --with-base",
    )
    _add_places(command)
    command.add_argument("--force", action="store_true", help="move refs that others moved there")
    _add_options(command, "also send the files of the base models")

    command = add(
        "pull",
        partial(_push_or_pull, pull),
        "fetch new files of another place into the store",
        "pull run/store s3://bucket/run",
    )
    _add_places(command)
    command.add_argument("--force", action="store_true", help="move refs that were moved here")
    _add_options(command, "also fetch the files of base models that are not on this machine")
    _add_base_directory(command)

    command = add(
        "clone",
        _clone,
        "make a store from the content of another place, or resume an interrupted clone",
        "clone s3://bucket/run run/store --with-base",
    )
    command.add_argument("url", help=_URL_HELP)
    command.add_argument("directory", help="a new or empty directory, or an interrupted clone")
    _add_options(command, "also fetch the files of the base models")
    _add_base_directory(command)


def _push_or_pull(operation: Callable[..., Transfer], options: argparse.Namespace) -> Output:
    return _transfer(operation, options, _local_store(options), options.url)


def _clone(options: argparse.Namespace) -> Output:
    places = options.url, options.directory
    # Also accept the order of push and pull: the store, then the URL.
    if is_url(options.directory) and not is_url(options.url):
        places = options.directory, options.url
    return _transfer(clone, options, *places)


def _transfer(
    operation: Callable[..., Transfer], options: argparse.Namespace, *places: str
) -> Output:
    keywords = {name: getattr(options, name) for name in _KEYWORDS if hasattr(options, name)}
    with progress_bar(enabled=not getattr(options, "json", False)) as progress:
        done = operation(*places, progress=progress, **keywords)
    return done, str(done)


def _local_store(options: argparse.Namespace) -> str:
    """Return the path of the store that is pushed, or pulled to."""
    if options.place is None:
        path = store_path(options)
        if path == os.curdir and not any(map(os.path.lexists, (CONFIG, MANIFESTS))):
            store, url = ("STORE", options.url) if is_url(options.url) else (options.url, "URL")
            raise InvalidInputError(
                "no store in the current directory; name both the store and the other place: "
                f"msft-store {options.name} {store} {url}"
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


def _add_places(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "place", metavar="STORE", nargs="?", help="the store's directory; the same as --store"
    )
    command.add_argument("url", help=_URL_HELP)


def _add_options(command: argparse.ArgumentParser, with_base: str) -> None:
    command.add_argument("--with-base", action="store_true", help=with_base)
    command.add_argument(
        "--timelines",
        action="store_true",
        help="also transfer the refs of timelines, to move a run to another machine",
    )


def _add_base_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base-directory",
        metavar="DIRECTORY",
        help="directory for the files of base models (default: STORE-bases, beside the store)",
    )
