"""A model whose weights cannot be restored in place is refused before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.errors import ConfigError
from trainer.training.preflight import check_compatibility


class Extra(torch.nn.Linear):
    def get_extra_state(self) -> dict[str, float]:
        return {"scale": 1.0}


class Packed(torch.nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().clone()


class Forgetful(torch.nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}bias"]


def check(model: torch.nn.Module) -> None:
    config: Any = SimpleNamespace(
        evaluation=SimpleNamespace(metric="loss"), restores_optimizer=False
    )
    text = SimpleNamespace(max_position_embeddings=None)
    model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[assignment]
    check_compatibility(config, SimpleNamespace(model=model), {}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "name"), [(Extra, "_extra_state"), (Packed, "weight")])
def test_weights_that_are_copies_are_named(kind: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"the model's '{name}' is not the memory"):
        check(kind(2, 2))


def test_what_is_trained_and_not_kept_is_named() -> None:
    with pytest.raises(ConfigError, match="the model's 'bias' is trained, but no checkpoint"):
        check(Forgetful(2, 2))
    check(Forgetful(2, 2).requires_grad_(False))


def test_plain_weights_and_an_adapter_on_others_pass() -> None:
    tied = torch.nn.Sequential(
        torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
    )
    tied[1].weight = tied[0].weight
    check(tied)
    adapted = Packed(2, 2).requires_grad_(False)
    adapted.add_module("lora_A", torch.nn.Linear(2, 2))
    part = torch.nn.Module()
    part.add_module("layer", adapted)
    check(part)
