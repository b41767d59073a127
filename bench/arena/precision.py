"""Training in bf16 on a processor that is slow at it, in a fraction of the time.

Without instructions for bf16 a product of matrices takes ten to twenty times as long as in fp32.
There its factors are cast to fp32 and the result is rounded to bf16, in the forward and in the
backward pass. So weights, activations, gradients and optimizer states are in bf16 as before, and
only the sums inside of a product are in another order.

Example::

    with fast_products():
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

PRODUCTS = {linear, torch.matmul, torch.Tensor.matmul, scaled_dot_product_attention}
"""The functions that a language model spends its time in."""
SLOW = 3
"""Processor time of a product in bf16, in times of one in fp32, from which on bf16 is slow."""


class FloatProducts(TorchFunctionMode):
    """While it is entered, products of bf16 matrices are computed in fp32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func not in PRODUCTS or not any(map(_is_bf16, (*args, *named.values()))):
            return func(*args, **named)
        result = func(*map(_widen, args), **{name: _widen(value) for name, value in named.items()})
        return result.to(torch.bfloat16)


def fast_products() -> AbstractContextManager[Any]:
    """Return :class:`FloatProducts` where bf16 is slow; elsewhere a context that does nothing."""
    return FloatProducts() if is_slow() else contextlib.nullcontext()


def describe() -> str:
    """Return in words how products are computed here."""
    return "in fp32, rounded to bf16" if is_slow() else "in bf16"


@functools.cache
def is_slow() -> bool:
    """Return True if a trial says that products in bf16 are slow on this processor."""
    left, right = torch.ones(256, 512), torch.ones(1024, 512)
    return _time(left.bfloat16(), right.bfloat16()) > SLOW * _time(left, right)


def _time(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the shortest processor time of a product; the first call only warms up."""
    taken = []
    for _ in range(4):
        began = time.process_time()
        linear(left, right)
        taken.append(time.process_time() - began)
    return min(taken[1:])


def _is_bf16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _widen(value: Any) -> Any:
    return value.float() if _is_bf16(value) else value
