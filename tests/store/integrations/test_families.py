"""Models whose weights have other names and shapes in memory than in files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from msft_store import Box, InvalidInputError, KeepLast, Parts, Store, Timeline
from msft_store.cli.main import main
from tests.support.states import same_bits

TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **TEXT))


def qwen3_moe() -> PreTrainedModel:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(decoder_sparse_step=1, head_dim=16, **sizes, **TEXT))


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(**TEXT)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    )


def qwen3_vl_moe() -> PreTrainedModel:
    """Return a model whose experts are turned in its files."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    }
    text = {"head_dim": 16, "rope_parameters": rope, **sizes, **TEXT}
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )


FAMILIES = [mixtral, qwen3_moe, llava, qwen3_vl_moe]


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """Return a model; its files are in ``files``, and those with its own names in ``memory``."""
    torch.manual_seed(0)
    made: PreTrainedModel = request.param().to(torch.bfloat16)
    made.save_pretrained(tmp_path / "files")
    made.save_pretrained(tmp_path / "memory", save_original_format=False)
    return made


def train(model: PreTrainedModel, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand(parameter.shape) < 0.02] *= 1.01


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_save_costs_as_much_as_against_a_base_in_memory_names(
    model: PreTrainedModel, tmp_path: Path, store: Store
) -> None:
    files, memory = (store.add_base(tmp_path / form) for form in ("files", "memory"))
    same = store.save(model, parent=files)
    assert same.stored_bytes <= 0.005 * same.logical_bytes
    train(model)
    one, two = store.save(model, parent=files), store.save(model, parent=memory)
    assert one.stored_bytes <= 1.1 * two.stored_bytes <= 0.03 * two.logical_bytes
    fresh = Store.open(store.path)
    assert same_bits(fresh.load(one.id), state_of(model))
    assert fresh.check(read_data=True) == []


def test_an_export_has_the_names_of_the_files_and_loads_exactly(
    model: PreTrainedModel, tmp_path: Path, store: Store
) -> None:
    base = store.add_base(tmp_path / "files")
    train(model)
    ckpt = store.save(model, parent=base)
    for layout in ("files", "memory"):
        store.export(ckpt, tmp_path / layout / "out", layout=layout)
        written = tensors_in(tmp_path / layout / "out")
        assert {name: t.shape for name, t in written.items()} == {
            name: t.shape for name, t in tensors_in(tmp_path / layout).items()
        }
        loaded = type(model).from_pretrained(tmp_path / layout / "out", dtype=torch.bfloat16)
        assert same_bits(loaded.state_dict(), state_of(model))
    model.save_pretrained(tmp_path / "trained")
    assert same_bits(tensors_in(tmp_path / "files" / "out"), tensors_in(tmp_path / "trained"))


@pytest.mark.parametrize("base", ["files", "memory"])
def test_files_are_imported_against_a_base_of_the_other_form(
    model: PreTrainedModel, tmp_path: Path, store: Store, base: str
) -> None:
    store.add_base(tmp_path / base)
    train(model)
    model.save_pretrained(tmp_path / "trained", save_original_format=base == "memory")
    assert main(["--store", store.path, "import", str(tmp_path / "trained"), "--ref", "it"]) == 0
    ckpt = Store.open(store.path).get("it")
    assert ckpt.stored_bytes <= 0.03 * ckpt.logical_bytes
    store.export(ckpt.id, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert same_bits(loaded.state_dict(), state_of(model))


def test_a_timeline_rolls_back_over_evictions(
    model: PreTrainedModel, tmp_path: Path, store: Store
) -> None:
    base = store.add_base(tmp_path / "files")
    with Timeline(store, base, retention=KeepLast(2)) as timeline:
        states = []
        for step in range(4):
            train(model, step)
            states.append(state_of(model))
            ckpt = timeline.commit(model, step=step)
            assert ckpt.stored_bytes <= 0.1 * ckpt.logical_bytes
        timeline.rollback(timeline.checkpoints()[0], into=model)
        assert same_bits(state_of(model), states[2])
        train(model, 9)
        last = timeline.commit(model, step=5)
        assert same_bits(store.load(last), state_of(model))


def halves(state: Mapping[str, torch.Tensor], rank: int) -> list[Box]:
    """Return the boxes of one of two ranks: half of each tensor along its first dimension."""
    boxes = []
    for name, tensor in state.items():
        rows = tensor.shape[0] // 2 if tensor.dim() else 0
        part = tensor[:rows] if rank == 0 else tensor[rows:]
        offset = (rows * rank, *(0 for _ in tensor.shape[1:])) if tensor.dim() else ()
        if tensor.dim() or rank:
            boxes.append(Box(name=name, shape=tuple(tensor.shape), offset=offset, tensor=part))
    return boxes


def test_ranks_encode_their_shares_of_fused_tensors(
    model: PreTrainedModel, tmp_path: Path, store: Store
) -> None:
    base = store.add_base(tmp_path / "files")
    train(model)
    state = state_of(model)
    parts = [store.encode(halves(state, rank), parent=base) for rank in range(2)]
    ckpt = store.save(Parts(parts), parent=base)
    assert ckpt.stored_bytes <= 0.03 * ckpt.logical_bytes
    assert same_bits(Store.open(store.path).load(ckpt.id), state)
    store.export(ckpt, tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == tensors_in(tmp_path / "files").keys()


def test_a_model_of_another_kind_than_the_base_is_warned_of_once(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    save_file({f"a.{at}": torch.randn(32, 32) for at in range(4)}, tmp_path / "base.safetensors")
    base = store.add_base(tmp_path / "base.safetensors")
    other = {f"b.{at}": torch.randn(32, 32) for at in range(4)}
    with caplog.at_level(logging.WARNING):
        store.save(other, parent=base)
        store.save(other, parent=base, step=2)
    (record,) = [r for r in caplog.records if "counterpart" in r.message]
    assert "'b.0'" in record.message
    assert "save_original_format=False" in record.message
    assert base.id[:12] in record.message


def test_a_layout_that_is_not_possible_is_refused(tmp_path: Path, store: Store) -> None:
    weights = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    save_file({"w": weights}, tmp_path / "base.safetensors")
    base = store.add_base(tmp_path / "base.safetensors")
    ckpt = store.save({"v": torch.cat([weights, weights[:3] + 1])}, parent=base)
    with pytest.raises(InvalidInputError, match="leave the layout out"):
        store.export(ckpt, tmp_path / "out", layout="files")
    store.export(ckpt, tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == {"v"}
    alone = store.save({"v": weights})
    with pytest.raises(InvalidInputError, match="has no base"):
        store.export(alone, tmp_path / "other", layout="files")
