"""Select the content of an export: its tensors, and files that say what these are.

The files that were recorded with a checkpoint describe its model. Files of the base, or of a
directory that the caller names, fill in what the record lacks, but no file that belongs to a
recorded one: a recorded tokenizer is not mixed with the base's.

Invariant: ``from_pretrained`` of an export rounds no weight, or :func:`find_doubts` says so.

Example::

    content = select_content(catalog, checkpoint, tensors, like=None, layout=None)
    content.written["config.json"]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msft_store._util import format_count
from msft_store.errors import CorruptedError, InvalidInputError, StoreError
from msft_store.format.layout import BaseSpan
from msft_store.maintenance.export_names import Exported, Layout, content_of, exported
from msft_store.objects.base_reader import BaseReader
from msft_store.objects.bases import Base
from msft_store.objects.catalog import Catalog
from msft_store.objects.manifest import Checkpoint, TensorEntry
from msft_store.pipeline.decode import Source, decode_state, empty_like
from msft_store.storage.backend import TEMPORARY, read_file, translate_os_errors
from msft_store.tensors.files import PREFIX, WEIGHTS, check_sizes, split_files
from msft_store.tensors.matching import format_names
from msft_store.tensors.nested import json_name

CONFIG, ADAPTER_CONFIG = _CONFIGS = ("config.json", "adapter_config.json")
"""Configuration files of a model and of a LoRA adapter, whose weights are in one other file."""
GENERATION_CONFIG = "generation_config.json"
_LARGEST_COPIED_FILE = 1 << 30
TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates, beside a tokenizer or processor."""
_TIED = "tie_word_embeddings"
_DTYPES = ("dtype", "torch_dtype")
"""Names of the field for the dtype, of which older releases of transformers write the second."""
_QUANTIZATION = "quantization_config"
_WIDER = {
    "float16": ("float32", "float64"),
    "bfloat16": ("float32", "float64"),
    "float32": ("float64",),
    "float64": (),
}
"""Dtypes that a configuration can name, and those that hold each of their values."""

_TOKENIZER = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "chat_template.json",
        "chat_template.jinja",
    }
)
_PROCESSOR = frozenset(
    {
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
    }
)
_MODEL = frozenset({CONFIG, GENERATION_CONFIG})
_BELONGING = {
    CONFIG: _MODEL,
    ADAPTER_CONFIG: _MODEL,
    "tokenizer_config.json": _TOKENIZER,
    "processor_config.json": _PROCESSOR,
    "preprocessor_config.json": _PROCESSOR,
}
"""Files that one writer writes together. If the first is recorded, the others of the base do not
belong to it.
"""


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content of an export."""

    chosen: Exported
    is_adapter: bool
    written: Mapping[str, bytes]
    """The other files by name."""
    copied: Mapping[str, tuple[Path, int]]
    """Files by name that are copied, and their sizes in bytes."""
    doubts: tuple[str, ...]
    """Reasons why ``from_pretrained`` may not give the model."""


def select_content(
    catalog: Catalog,
    checkpoint: Checkpoint,
    stored: Mapping[str, TensorEntry],
    like: Path | None,
    layout: Layout | None,
) -> Content:
    """Return the content of the export of a checkpoint with these stored tensors."""
    base = None if checkpoint.base is None else catalog.objects.base(checkpoint.base).base
    written = read_files(catalog, checkpoint) if like is None else {}
    copied = {
        name: place
        for name, place in _files_to_copy(catalog, checkpoint, like).items()
        if not belongs_to_recorded(name, written)
    }
    is_recorded = CONFIG in written
    config = parse_config(written[CONFIG] if is_recorded else read_place(copied.get(CONFIG)))
    mapping = catalog.tables.mapping(checkpoint)
    chosen = exported(
        checkpoint, stored, base, ties=ties_tensors(config), mapping=mapping, layout=layout
    )
    names = {*written, *copied}
    is_adapter = chosen.adapter is not None or (ADAPTER_CONFIG in names and CONFIG not in names)
    adapters = {} if chosen.adapter is None else {ADAPTER_CONFIG: dict(chosen.adapter)}
    adapters |= {
        f"{name}/{ADAPTER_CONFIG}": dict(part.adapter or {})
        for name, part in chosen.further.items()
    }
    for name, settings in adapters.items():
        written[name] = json.dumps(settings, indent=2, sort_keys=True).encode()
    if config is not None and not is_adapter and (mended := mend_dtype(config, chosen.tensors)):
        config = mended
        written[CONFIG] = f"{json.dumps(mended, indent=2, sort_keys=True)}\n".encode()
    adapter = written.get(ADAPTER_CONFIG) or read_place(copied.get(ADAPTER_CONFIG))
    doubts = (
        find_adapter_doubts(parse_config(adapter) or {}, chosen.tensors)
        if is_adapter
        else find_doubts(
            config, chosen.tensors, base, names, is_recorded, counterparts=chosen.counterparts
        )
    )
    return Content(
        chosen=chosen,
        is_adapter=is_adapter,
        written=written,
        copied={name: place for name, place in copied.items() if name not in written},
        doubts=tuple(doubts),
    )


def read_place(place: tuple[Path, int] | None) -> bytes:
    """Return the bytes of a file to copy; none for ``None``."""
    return b"" if place is None else read_file(place[0], 0, place[1])


def _files_to_copy(
    catalog: Catalog, checkpoint: Checkpoint, like: Path | None
) -> dict[str, tuple[Path, int]]:
    """Return the files to copy by name, and their sizes in bytes."""
    folder = like
    if folder is None and checkpoint.base is not None:
        reader = catalog.objects.base(checkpoint.base)
        path = Path(reader.base.path)
        folder = path if path.is_dir() and _contains_base(reader, path) else None
    if folder is None:
        return {}
    with translate_os_errors("read", folder):
        files = companions(folder)
        if (folder / TEMPLATES).is_dir():
            files += companions(folder / TEMPLATES)
        sizes = {file.relative_to(folder).as_posix(): (file, file.stat().st_size) for file in files}
    if like is not None and not sizes.keys() & {*_CONFIGS}:
        raise InvalidInputError(f"{like} has no {' or '.join(_CONFIGS)} to copy")
    return sizes


def is_configured(files: Iterable[Path]) -> bool:
    """Return True if a configuration for ``from_pretrained`` is among files."""
    return any(file.name in _CONFIGS for file in files)


def companions(folder: Path) -> list[Path]:
    """Return the files of a model directory that are not weights; may raise ``OSError``."""
    files = sorted(file for file in folder.iterdir() if _is_companion(file))
    return [file for file in files if file.stat().st_size <= _LARGEST_COPIED_FILE]


def _is_companion(file: Path) -> bool:
    # The backend creates its folder of temporary files while it writes an export.
    other = file.name.endswith(WEIGHTS) or file.name.startswith(".") or file.name == TEMPORARY
    return not other and file.is_file()


def _contains_base(reader: BaseReader, folder: Path) -> bool:
    """Return True if a folder contains the weights of the base, by a sample of each file.

    The store of a stranger may name any folder, and its files must not leak into an export.
    """
    smallest: dict[int, tuple[int, str]] = {}
    for name, tensor in reader.base.tensors.items():
        if tensor.nbytes and Path(reader.base.files[tensor.file][0]).parent == folder:
            candidate = tensor.nbytes, name
            smallest[tensor.file] = min(candidate, smallest.get(tensor.file, candidate))
    try:
        for _, name in smallest.values():
            reader.verify_span(BaseSpan(tensor=name, start=0), 1)
    except StoreError:
        return False
    return bool(smallest)


def read_files(catalog: Catalog, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files that were recorded with a checkpoint, after a check of their names."""
    table = split_files(catalog.tensors(checkpoint))[1]
    try:
        check_sizes({name: entry.nbytes for name, entry in table.items()})
    except InvalidInputError as error:
        raise CorruptedError(f"checkpoint {checkpoint.id[:12]}: {error}") from None
    for name, entry in table.items():
        if entry.dtype.name != "uint8" or len(entry.shape) != 1:
            raise CorruptedError(f"checkpoint {checkpoint.id[:12]}: {name!r} is not a file's bytes")
    tensors = {PREFIX + name: entry for name, entry in table.items()}
    outs = {name: empty_like(entry, "cpu") for name, entry in tensors.items()}
    decode_state(Source.of(catalog, checkpoint), tensors, outs)
    return {name: outs[PREFIX + name].numpy().tobytes() for name in table}


def belongs_to_recorded(name: str, recorded: Iterable[str]) -> bool:
    """Return True if a file of the base would describe another state of what is recorded."""
    known = set(recorded)
    families = [family for first, family in _BELONGING.items() if first in known]
    folder = name.partition("/")[0]
    is_template = folder == TEMPLATES and any("chat_template.json" in one for one in families)
    return name in known or is_template or any(name in family for family in families)


def parse_config(data: bytes | None) -> dict[str, Any] | None:
    """Return the configuration of a model; ``None`` if there is none that can be read."""
    try:
        found = json.loads(data or b"")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def ties_tensors(config: Mapping[str, Any] | None) -> bool:
    """Return True if a loader that reads a configuration ties tensors."""
    if config is None or "model_type" not in config:
        return False
    # A model that contains other models has a configuration for each of them.
    return not any(part.get(_TIED) is False for part in _parts(config))


def mend_dtype(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> dict[str, Any] | None:
    """Return a configuration with the one dtype that all floats have; ``None`` if it fits.

    The dtype of a quantised model is that of its computation, and stays.
    """
    found = sorted({entry.dtype.name for entry in tensors.values() if entry.dtype.floating})
    (dtype, *others) = found or ("",)
    if others or dtype not in _WIDER or _QUANTIZATION in config:
        return None
    mended: dict[str, Any] = json.loads(json.dumps(config))
    for part in _parts(mended):
        part.update({key: dtype for key in _DTYPES if isinstance(part.get(key), str)})
    return None if mended == config else mended


def find_adapter_doubts(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """Yield reasons why PEFT may not give an exported adapter.

    PEFT keeps the dtype of an adapter's own tensors, but rounds the others to that of its base.
    """
    own = f".{str(settings.get('peft_type')).lower()}_"
    wide = sorted(
        name
        for name, entry in tensors.items()
        if own not in name
        and name.endswith((".weight", ".bias", ".trainable_tokens_delta"))
        and entry.dtype.name in _WIDER["bfloat16"]
    )
    if wide:
        yield (
            f"{format_count(len(wide), 'tensor')} besides the adapter ({format_names(wide)}) of "
            f"{tensors[wide[0]].dtype.name}: PEFT rounds these if the base is loaded in another "
            f"dtype, so load with dtype={tensors[wide[0]].dtype.name}"
        )


def find_doubts(
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, TensorEntry],
    base: Base | None,
    files: Iterable[str],
    is_recorded: bool,
    *,
    counterparts: Mapping[str, Collection[str]],
) -> Iterator[str]:
    """Yield reasons why ``from_pretrained`` of an export may not give the model.

    ``config`` is the configuration that the export has, after :func:`mend_dtype`, and was recorded
    with the checkpoint if ``is_recorded``. ``files`` are the names of the export's other files.
    ``counterparts`` has the names in the base of exported tensors of another name or shape.
    """
    parts = [name for name in tensors if is_kept_in_parts(name, tensors)]
    if parts:
        yield (
            f"{format_count(len(parts), 'value')} in several parts, as of a quantised weight "
            f"({format_names(parts)}): from_pretrained cannot rebuild these. Quantise a model "
            "in the same way and restore it with Store.load_into, or export dequantised weights"
        )
    if config is None:
        return
    rounded = sorted(_rounded(config, tensors, base))
    if rounded:
        yield (
            f"config.json says {_dtype_of(config)}, to which from_pretrained rounds "
            f"{format_count(len(rounded), 'tensor')} ({format_names(rounded)}): load with dtype="
            f"{tensors[rounded[0]].dtype.name}"
        )
    code = sorted(_code_of(config) - set(files))
    if code:
        yield f"config.json names code that the base does not have ({', '.join(code)}): copy it"
    if is_recorded or base is None:
        return
    # What has a counterpart in another form is loaded in either form.
    ours = set(tensors) - counterparts.keys()
    used = {other for found in counterparts.values() for other in found}
    theirs = set(base.tensors) - (used - tensors.keys())
    named = {content_of(tensors[name]) for name in ours & theirs}
    # A tensor that is tied to one of the base is none of its own.
    added = {
        n: tensors[n].shape for n in sorted(ours - theirs) if content_of(tensors[n]) not in named
    }
    # Untrained scales and biases are equal, and any of them may be the counterpart of another.
    equal = {base.tensors[n].keys for n in used}
    missing = {
        n: base.tensors[n].shape for n in sorted(theirs - ours) if base.tensors[n].keys not in equal
    }
    differing = {
        "of another shape": {n for n in ours & theirs if tensors[n].shape != base.tensors[n].shape},
        "not in the base": _without_counterparts(added, missing),
        "in the base alone": _without_counterparts(missing, added),
    }
    said = [
        f"{format_count(len(names), 'tensor')} {where} ({format_names(sorted(names))})"
        for where, names in differing.items()
        if names
    ]
    if said:
        yield (
            f"config.json is not the model's own and may not fit, for there are {'; '.join(said)}. "
            "from_pretrained may fail, or begin tensors at random: save with "
            "files=model_files(model), or export with a directory of such a model (like=, --like)"
        )


def _without_counterparts(
    shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Return the names without as many as there are others of the shape: those were renamed."""
    left, found = Counter(others.values()), set()
    for name, shape in shapes.items():
        left[shape] -= 1
        if left[shape] < 0:
            found.add(name)
    return found


def _parts(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a configuration and those of the models in it."""
    yield config  # type: ignore[misc]
    for key, value in config.items():
        if isinstance(value, dict) and key != _QUANTIZATION:
            yield from _parts(value)


def _dtype_of(config: Mapping[str, Any]) -> str | None:
    found = next((config[key] for key in _DTYPES if isinstance(config.get(key), str)), None)
    return found if found is None else str(found)


def _rounded(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], base: Base | None
) -> Iterator[str]:
    """Yield tensors that do not fit into the configured dtype, unless the base has them so."""
    dtype = _dtype_of(config)
    if dtype not in _WIDER or _QUANTIZATION in config:
        return
    theirs = {} if base is None else base.tensors
    for name, entry in tensors.items():
        own = entry.dtype.name
        fits = own == dtype or dtype in _WIDER.get(own, (dtype,))
        if not fits and not (name in theirs and theirs[name].dtype == entry.dtype):
            yield name


def _code_of(config: Mapping[str, Any]) -> set[str]:
    """Return the names of the files with code that a configuration needs beside it."""
    named = config.get("auto_map")
    values = named.values() if isinstance(named, Mapping) else ()
    return {
        f"{value.partition('.')[0]}.py"
        for value in values
        if isinstance(value, str) and "--" not in value and "." in value
    }


def is_kept_in_parts(name: str, tensors: Mapping[str, TensorEntry]) -> bool:
    """Return True for the name of the JSON of a tensor subclass or of another value."""
    whole = name.removesuffix(".json")
    entry = tensors[name]
    return name == json_name(whole) and entry.dtype.name == "uint8" and len(entry.shape) == 1
