"""The product and the plain reader can read the stores that earlier versions wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from msft_store import Store
from msft_store.format.dtypes import dtype_by_name
from tests.fixtures.stores.write import PLACE, moved, names_of, sha256, sums_of, write
from tests.support.plain_store import PlainStore
from tests.support.states import same_bits

FOLDER = Path(__file__).parents[2] / "fixtures" / "stores"
VERSIONS = sorted(path.name for path in FOLDER.glob("v*"))
KEPT = [f"{version}/{name}" for version in VERSIONS for name in names_of(int(version[1:]))]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


def sums(version: str) -> dict[str, Any]:
    return json.loads((FOLDER / version / "SUMS.json").read_bytes())


@pytest.fixture
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, dict[str, Any]]:
    """Return a copy of a kept store with relocated bases, and the checksums of its tensors."""
    version, name = request.param.split("/")
    folder = tmp_path / name
    shutil.copytree(FOLDER / version / name, folder)
    store = Store.open(folder / "store")
    for base in store.bases():
        store.relocate(base, folder / Path(base.path).relative_to(PLACE / name))
    return store, sums(version)["stores"][name]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_file_changed(version: str) -> None:
    files = sums(version)["files"]
    found = {
        path.relative_to(FOLDER / version).as_posix(): sha256(path.read_bytes())
        for path in (FOLDER / version).rglob("*")
        if path.is_file() and path.name != "SUMS.json"
    }
    assert found == files


@pytest.mark.parametrize("kept", KEPT, indirect=True)
def test_the_product_reads_it(kept: tuple[Store, dict[str, Any]]) -> None:
    store, expected = kept
    assert sums_of(store) == expected
    assert store.check() == []


@pytest.mark.parametrize("kept", KEPT, indirect=True)
def test_the_plain_reader_reads_it(kept: tuple[Store, dict[str, Any]]) -> None:
    store, expected = kept
    plain = PlainStore(Path(store.path))
    assert plain.refs() == store.refs()
    assert plain.checkpoints().keys() == expected.keys()
    for identity, tensors in expected.items():
        found = plain.restore(identity).items()
        assert {n: [dtype, shape, sha256(data)] for n, (dtype, shape, data) in found} == tensors


@pytest.mark.parametrize("kept", KEPT, indirect=True)
def test_the_product_continues_it(kept: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    store, expected = kept
    parents = store.log()
    floats = store.load(parents[-1])
    floats = {name: floats[name] for name in floats if floats[name].element_size() in (2, 4)}
    state = moved({n: t for n, t in floats.items() if t.is_floating_point()}, 0.1, 9)
    added = store.save(state, parent=parents[-1])
    store.plan_gc().execute()
    again = Store.open(store.path)
    assert same_bits(again.load(added.id), state)
    assert {key: tensors for key, tensors in sums_of(again).items() if key != added.id} == expected
    assert again.check() == []
    out = tmp_path / "out"
    (file,) = [
        path for path in again.export(added.id, out, layout="memory") if path.stem == "model"
    ]
    assert same_bits(safetensors.torch.load_file(file), state)
    for parent in parents:
        if all(dtype_by_name(dtype).safetensors for dtype, _, _ in expected[parent.id].values()):
            again.export(parent, tmp_path / parent.id, layout="memory")
            file, loaded = tmp_path / parent.id / "model.safetensors", again.load(parent)
            # The export uses the names of the base, which lack a common prefix of the checkpoint.
            known = loaded if parent.base is None else again.base(parent.base).tensors
            prefix = "" if loaded.keys() & known.keys() else "model."
            assert same_bits(
                safetensors.torch.load_file(file),
                {name.removeprefix(prefix): tensor for name, tensor in loaded.items()},
            )


def test_they_have_every_feature_of_the_format() -> None:
    found = [
        record
        for version in VERSIONS
        for path in (FOLDER / version).glob("*/store")
        for pack in PlainStore(path).packs.values()
        for record in pack.records
    ]
    assert {record.codec for record in found} == set(range(10))
    assert {record.depth for record in found} == set(range(17))
    assert {record.generation for record in found} >= {0, 1}
    assert len({record.dtype for record in found}) == 21
    assert {key for record in found for key in record.reference or ()} == {
        *("tensor", "start", "box", "chunks", "view")
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_the_script_writes_the_same_checkpoints(tmp_path: Path, version: str) -> None:
    write(tmp_path / version, int(version[1:]))
    written = json.loads((tmp_path / version / "SUMS.json").read_bytes())
    assert written["stores"] == sums(version)["stores"]

    def others(files: dict[str, Any]) -> set[str]:
        return {file for file in files if "/packs/" not in file}

    # The names of packs depend on the references that a save chooses.
    assert others(written["files"]) == others(sums(version)["files"])
