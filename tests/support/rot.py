"""Damage to files as media and people cause it, and small stores of every kind to damage.

Example::

    kept = copy_of("v2/fast", tmp_path)
    damage(random.Random(0), kept.files())
    kept.loadable()                           # ids that are still there, to the last bit
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msft_store import Store, StoreError
from tests.fixtures.stores.write import PLACE
from tests.support.states import State, same_bits

FIXTURES = Path(__file__).parent.parent / "fixtures" / "stores"
STORES = (
    *("v1/fast", "v1/pieces"),
    *("v2/deep", "v2/dtypes", "v2/fast", "v2/pieces", "v2/small", "v2/views"),
)
"""Together they have every codec, dtype, depth and kind of file."""


@dataclass(frozen=True)
class Kept:
    """A store, and its content before the damage."""

    root: Path
    states: Mapping[str, State]
    """Tensors by checkpoint id."""
    bases: Mapping[str, Path]
    """The paths of the files of each base, by id."""

    def files(self) -> list[Path]:
        """Return all files of the store."""
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def loadable(self) -> set[str]:
        """Return the ids that can be loaded; assert that what is loaded is what was saved."""
        found = set()
        try:
            store = Store.open(self.root)
        except StoreError:
            return found
        for identity, state in self.states.items():
            try:
                loaded = store.load(identity)
            except StoreError:
                continue
            assert same_bits(loaded, state), f"{identity} is not what was saved"
            found.add(identity)
        return found


def copy_of(name: str, folder: Path) -> Kept:
    """Return an undamaged copy of a store below ``folder``."""
    place, kind = folder / name, Path(name).name
    shutil.copytree(FIXTURES / name, place)
    store = Store.open(place / "store")
    for base in store.bases():
        store.relocate(base, place / Path(base.path).relative_to(PLACE / kind))
    return Kept(
        root=place / "store",
        states={ckpt.id: store.load(ckpt) for ckpt in store.log()},
        bases={base.id: Path(base.path) for base in store.bases()},
    )


def flipped_bit(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def changed_byte(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([(data[at] + rng.randrange(1, 256)) % 256]) + data[at + 1 :]


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def appended(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\n", b"\0" * 512, rng.randbytes(40), data])


def zeroed(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    page = data[at : at + 512]
    return data[:at] + bytes(len(page)) + data[at + 512 :]


WAYS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bit": flipped_bit,
    "byte": changed_byte,
    "truncated": truncated,
    "appended": appended,
    "zeroed": zeroed,
}


def damage(rng: random.Random, files: Sequence[Path]) -> str:
    """Damage one of some files, or swap two of a kind; return a description."""
    path = rng.choice([file for file in files if file.stat().st_size])
    peers = [file for file in files if file.parent == path.parent and file != path]
    how = rng.choice([*WAYS, "swapped"] if peers else list(WAYS))
    if how == "swapped":
        other = rng.choice(peers)
        data = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"{path.parent.name}/{path.name} swapped with {other.name}"
    path.write_bytes(WAYS[how](rng, path.read_bytes()))
    return f"{path.parent.name}/{path.name} {how}"


def changed_at(path: Path, offset: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
