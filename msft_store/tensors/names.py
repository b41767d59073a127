"""Names of tensors without the parts that ``torch.compile`` adds to them.

A compiled module holds the original one as ``_orig_mod``, so the names of its tensors contain this
word. They are the same tensors, and a checkpoint has them under their original names.

Example::

    plain_name("layers.0._orig_mod.weight")      # "layers.0.weight"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

_T = TypeVar("_T")
_WRAPPER = re.compile(r"(^|\.)(?:_orig_mod\.)+")


def plain_name(name: str) -> str:
    """Return a tensor's name in the module that was not compiled."""
    return _WRAPPER.sub(r"\1", name)


def plain_names(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Give tensors their plain names; change no name if two names would become equal."""
    renamed = {plain_name(name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


class AnyNames(dict[str, _T]):
    """Values by name, found under the name that was given and under its plain name."""

    @cached_property
    def _plain(self) -> dict[str, _T]:
        return plain_names(self)

    def __missing__(self, name: str) -> _T:
        return self._plain[plain_name(name)]

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(name) or plain_name(name) in self._plain
