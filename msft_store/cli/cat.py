"""``msft-store cat``: show one tensor of a checkpoint, or write it to a file or to stdout.

Example::

    document, text = cat(options)
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from msft_store._util import format_bytes, format_shape
from msft_store.address import open_checkpoint
from msft_store.cli.remote import Output, store_path
from msft_store.errors import InvalidInputError, StorageError
from msft_store.maintenance.reader import CheckpointReader
from msft_store.tensors.bytes import to_bytes

_FIRST = 8
_STEP = 1 << 20
"""Elements that are summed up at once, in float64."""
STDOUT = "-"


@dataclass
class _Statistics:
    """Smallest, largest and sums of the finite elements of a tensor."""

    smallest: float = math.inf
    largest: float = -math.inf
    total: float = 0.0
    squares: float = 0.0
    finite: int = 0

    def add(self, part: torch.Tensor) -> None:
        """Count the elements of a part of the tensor."""
        values = part.double()
        values = values[values.isfinite()]
        if values.numel():
            self.smallest = min(self.smallest, values.min().item())
            self.largest = max(self.largest, values.max().item())
            self.total += values.sum().item()
            self.squares += values.square().sum().item()
            self.finite += values.numel()

    def document(self) -> dict[str, float | None]:
        """Return the statistics; a number is ``None`` if no element is finite."""
        known = self.finite > 0
        return {
            "min": self.smallest if known else None,
            "max": self.largest if known else None,
            "mean": self.total / self.finite if known else None,
            "norm": math.sqrt(self.squares) if known else None,
        }


def add_cat_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``cat``."""
    command.add_argument(
        "address", metavar="STORE@REF", help="path or URL of a store, and a ref or id; or a ref"
    )
    command.add_argument("tensor", help="name of a tensor, as in inspect CHECKPOINT")
    command.add_argument(
        "--out",
        metavar="FILE",
        help="write the tensor to a new FILE.safetensors, or its raw bytes to stdout (-)",
    )


def cat(options: argparse.Namespace) -> Output:
    """Show one tensor, or write it."""
    out = options.out
    if out not in (None, STDOUT) and not out.endswith(".safetensors"):
        raise InvalidInputError(f"--out takes FILE.safetensors or -, not {out!r}")
    if out == STDOUT and getattr(options, "json", False):
        raise InvalidInputError("stdout cannot have both the raw bytes and JSON: leave one out")
    address = (
        options.address if "@" in options.address else f"{store_path(options)}@{options.address}"
    )
    reader = open_checkpoint(address)
    tensor = reader.get_tensor(options.tensor)
    document = _describe(reader, options.tensor, tensor)
    if out == STDOUT:
        sys.stdout.buffer.write(to_bytes(tensor).data)
        return document, ""
    text = _format(document)
    if out is not None:
        _write(Path(out), options.tensor, tensor, reader)
        document["out"] = out
        text += f"\nwritten to {out}"
    return document, text


def _describe(reader: CheckpointReader, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    flat = tensor.reshape(-1)
    found = _Statistics()
    if not flat.is_complex():
        for start in range(0, flat.numel(), _STEP):
            found.add(flat[start : start + _STEP])
    first = [str(one) if flat.is_complex() else one for one in flat[:_FIRST].tolist()]
    return {
        "checkpoint": reader.checkpoint.id,
        "tensor": name,
        "dtype": reader.get_slice(name).get_dtype(),
        "shape": list(tensor.shape),
        "bytes": tensor.numel() * tensor.element_size(),
        **found.document(),
        "not_finite": 0 if flat.is_complex() else flat.numel() - found.finite,
        "first": [v if isinstance(v, str) or math.isfinite(v) else str(v) for v in first],
    }


def _format(document: dict[str, Any]) -> str:
    lines = {
        "checkpoint": document["checkpoint"],
        "tensor": document["tensor"],
        "dtype": f"{document['dtype']}, {format_bytes(document['bytes'])}",
        "shape": format_shape(document["shape"]),
        **{
            name: f"{document[name]:.6g}"
            for name in ("min", "max", "mean", "norm")
            if document[name] is not None
        },
        "first": " ".join(
            f"{value:.6g}" if isinstance(value, float) else str(value)
            for value in document["first"]
        ),
    }
    if document["not_finite"]:
        lines["not finite"] = f"{document['not_finite']} elements, left out above"
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def _write(path: Path, name: str, tensor: torch.Tensor, reader: CheckpointReader) -> None:
    if path.exists():
        raise InvalidInputError(f"{path} exists: name a new file")
    try:
        save_file({name: tensor}, path, metadata=reader.metadata())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error
    except (KeyError, ValueError) as error:
        raise InvalidInputError(f"safetensors has no dtype {tensor.dtype}: use --out -") from error
