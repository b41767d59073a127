"""Names of tensors without the parts that ``torch.compile`` adds to them.

A compiled module holds the original one as ``_orig_mod``, so the names of its tensors contain this
word. They are the same tensors, and a checkpoint has them under their original names.

Example::

    plain_name("layers.0._orig_mod.weight")      # "layers.0.weight"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

_T = TypeVar("_T")
_WRAPPER = re.compile(r"(^|\.)(?:_orig_mod\.)+")


def plain_name(name: str) -> str:
    """Return a tensor's name in the module that was not compiled."""
    return _WRAPPER.sub(r"\1", name)


def plain_names(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Give tensors their plain names; change no name if two names would become equal."""
    renamed = {plain_name(name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)
