"""The example in ``docs/FORMAT.md`` is a valid store, byte for byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import xxhash

from msft_store import Store
from tests.support.plain_codecs import inflate
from tests.support.plain_store import PlainStore
from tests.support.states import same_bits

PAGE = (Path(__file__).parents[3] / "docs" / "FORMAT.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.partition("\n## 8. An example\n")[2]
ROW = re.compile(r"\| (\d+) \| `((?:[0-9a-f]{2} ?)+)` \| .* \|")


def lines_of(heading: str) -> bytes:
    """Return the joined lines of the indented text below a heading."""
    lines = EXAMPLE.partition(heading)[2].lstrip("\n").partition("\n\n")[0].splitlines()
    assert all(line.startswith("    ") for line in lines)
    return "".join(line[4:] for line in lines).encode("ascii")


def bytes_of(heading: str) -> bytes:
    """Return the bytes of the table below a heading; each row has the offset that it states."""
    data = b""
    for line in EXAMPLE.partition(heading)[2].lstrip("\n").partition("\n\n")[0].splitlines()[2:]:
        row = ROW.fullmatch(line)
        assert row is not None, line
        assert int(row[1]) == len(data)
        data += bytes.fromhex(row[2])
    return data


def path_in(folder: str) -> str:
    """Return the path that the page gives for the file in a folder."""
    found = re.search(rf"`({folder}/[0-9a-f]{{32}}\.[a-z]+)`", EXAMPLE)
    assert found is not None
    return found[1]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Write the example as a store."""
    files = {
        "store.json": lines_of("`store.json`, one line without an end:"),
        "refs/best.json": lines_of("`refs/best.json`, one line without an end:"),
        path_in("packs"): bytes_of(f"`{path_in('packs')}`, 199 bytes:"),
        path_in("manifests"): b"%s\n%s"
        % (
            lines_of(f"`{path_in('manifests')}`, first line:"),
            bytes_of("and behind its end, 145 bytes:"),
        ),
    }
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path


def test_both_readers_restore_it(example: Path) -> None:
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([[1.0, 2], [3, 4.03125]])
    store = Store.open(example)
    assert same_bits(store.load("best"), {"a": a.bfloat16(), "b": b.bfloat16()})
    assert store.check() == []
    assert PlainStore(example).restore("best") == {
        "a": ("bfloat16", [4], bytes.fromhex("803f004040408040")),
        "b": ("bfloat16", [2, 2], bytes.fromhex("803f004040408140")),
    }


def test_the_decoded_footer_is_that_of_the_pack(example: Path) -> None:
    pack = (example / path_in("packs")).read_bytes()
    assert len(pack) == 199
    assert inflate(pack[43:151], 160) == bytes_of("Its footer, decoded, 160 bytes:")


def test_the_decoded_frame_is_the_tensor_table() -> None:
    frame = bytes_of("and behind its end, 145 bytes:")
    assert len(frame) == 145
    assert inflate(frame, 245) == lines_of("The tensor table, decoded, 245 bytes:")


def test_a_key_is_a_digest_of_dtype_and_bytes() -> None:
    found = re.search(r"the key of `a` is the xxh3-128 of `((?:[0-9a-f]{2} ?)+)`", EXAMPLE)
    assert found is not None
    key = xxhash.xxh3_128_hexdigest(bytes.fromhex(found[1]))
    assert f'{{"a":{{"dtype":"bfloat16","pieces":[{{"chunks":"{key}"' in EXAMPLE
