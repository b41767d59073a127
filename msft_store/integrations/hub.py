"""A model of the Hugging Face hub as a base: where its files are in the hub's cache.

Example::

    store.add_base(local_model("Qwen/Qwen3-0.6B"))          # which from_pretrained has fetched
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from msft_store.errors import BaseError
from msft_store.paths import PathLike, local_path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_model(path: PathLike) -> Path:
    """Return a path as it is; of a hub's id that is no path, the directory in the cache.

    Nothing is fetched: :class:`BaseError` if the model is not there.
    """
    found = local_path(path)
    if found.exists() or not (isinstance(path, str) and _HUB_ID.fullmatch(path)):
        return found
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise BaseError(
            f"{path} is no directory here and not in the cache of the Hugging Face hub: load the "
            "model first, or give the directory that it is in"
        ) from None
