"""Versions of weights in a stream, as refs of a store.

``versions/NAME/STEP`` and ``versions/NAME/latest`` are ordinary refs. Their notes name the packs
that a reader needs, so that it lists nothing: all of them for a reader that holds nothing, and
those with the changes for a reader that holds the version before. The names are advice: a reader
that does not find what it needs there lists the packs.

Example::

    version = Version(name="policy", step=40, checkpoint=ckpt.id)
    parse_version(ref).advice.packs
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msft_store.errors import CorruptedError, InvalidInputError
from msft_store.format.strict_json import check_id, check_natural, check_string
from msft_store.objects.refs import VERSIONS, Ref, check_ref_name

STEPS = "steps"
"""Folder of the packs that hold the changes from one version to the next."""
LATEST = "latest"
_PACK = re.compile("(packs|steps)/[0-9a-f]{32}[.]pack")

Sizes = Mapping[str, int]
"""Sizes of files in bytes, by path."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A published checkpoint; ``str()`` gives ``NAME@STEP``.

    Attributes:
        name: Name of the stream.
        step: Training step.
        checkpoint: Id of the checkpoint.
    """

    name: str
    step: int
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.name}@{self.step}"

    @property
    def ref(self) -> str:
        """Name of its ref."""
        return version_ref(self.name, str(self.step))

    @property
    def latest_ref(self) -> str:
        """Name of the ref that points to the latest version of the stream."""
        return version_ref(self.name, LATEST)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The packs that a version can be decoded from."""

    packs: Sizes
    """Packs that suffice for a reader that holds nothing but the base."""
    before: str | None
    """Id of the checkpoint that ``changes`` are taken from."""
    changes: Sizes
    """Packs that suffice for a reader that holds that one."""

    def to_note(self, step: int) -> dict[str, Any]:
        """Return the note of a version's ref."""
        return {
            "step": step,
            "packs": dict(self.packs),
            "before": self.before,
            "changes": dict(self.changes),
        }


def check_version_name(name: str) -> str:
    """Return ``name``; :class:`InvalidInputError` if no stream can have it."""
    if isinstance(name, str) and "/" in name:
        raise InvalidInputError(f"{name!r} cannot name versions: leave out '/'")
    check_ref_name(version_ref(name, LATEST) if isinstance(name, str) else name)
    return name


def version_ref(name: str, step: str) -> str:
    """Return the name of the ref of a step, or of ``latest``."""
    return f"{VERSIONS}{name}/{step}"


def parse_version(ref: Ref, what: str) -> tuple[Version, Advice]:
    """Return the version that a ref points to; ``what`` is its address for messages."""
    name = ref.name.removeprefix(VERSIONS).partition("/")[0]
    note = ref.note
    try:
        version = Version(name=name, step=check_natural(note["step"]), checkpoint=ref.checkpoint)
        before = note["before"]
        advice = Advice(
            packs=_sizes(note["packs"]),
            before=None if before is None else check_id(before),
            changes=_sizes(note["changes"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptedError(f"{what} is not the ref of a version: {error!r}", file=what) from None
    return version, advice


def _sizes(value: Any) -> Sizes:
    # Paths come from an untrusted ref, so none may lead elsewhere.
    for path in value:
        if not _PACK.fullmatch(check_string(path)):
            raise ValueError(f"{path!a:.80} is not the path of a pack")
    return {path: check_natural(size) for path, size in value.items()}
