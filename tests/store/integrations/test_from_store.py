"""Models that are loaded from a checkpoint are those of its export, without files of weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from msft_store import CorruptedError, InvalidInputError, KeepLast, Store, Timeline
from msft_store.integrations.hf import KeptModel, from_pretrained
from msft_store.integrations.model_files import model_files
from msft_store.integrations.remote import push
from tests.store.integrations.test_families import (
    TEXT,
    llava,
    mixtral,
    qwen3_moe,
    qwen3_vl_moe,
    state_of,
    train,
)
from tests.support.states import same_bits


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **TEXT))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4))


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**{k: v for k, v in TEXT.items() if "key_value" not in k}))


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(num_heads=4, **sizes))


FAMILIES = {
    llama: AutoModelForCausalLM,
    gpt2: AutoModelForCausalLM,
    bert: AutoModelForMaskedLM,
    t5: AutoModel,
    mixtral: AutoModelForCausalLM,
    qwen3_moe: AutoModelForCausalLM,
    llava: AutoModelForImageTextToText,
    qwen3_vl_moe: AutoModelForImageTextToText,
}


def saved(store: Store, make: Any, folder: Path, *, files: bool = True) -> PreTrainedModel:
    """Save a trained model as ``best``, against a base with the files of the untrained one."""
    torch.manual_seed(0)
    model: PreTrainedModel = make().to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    train(model)
    kept = model_files(model) if files else None
    store.pin(store.save(model, parent=store.add_base(folder), files=kept, step=3), "best")
    return model


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_a_model_of_every_family_is_that_of_the_export(
    make: Any, tmp_path: Path, store: Store
) -> None:
    model = saved(store, make, tmp_path / "base")
    cls = FAMILIES[make]
    loaded = from_pretrained(f"{store.path}@best", cls)
    store.export("best", tmp_path / "out")
    expected = cls.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(expected)
    assert same_bits(state_of(loaded), state_of(expected))
    if cls is not AutoModel:
        assert same_bits(state_of(loaded), state_of(model))
    theirs = {k: v for k, v in expected.config.to_dict().items() if k != "_name_or_path"}
    assert {k: v for k, v in loaded.config.to_dict().items() if k != "_name_or_path"} == theirs
    tied = [p.data_ptr() for p in expected.parameters()]
    assert len({p.data_ptr() for p in loaded.parameters()}) == len(set(tied))
    assert not loaded.training


def test_arguments_are_those_of_transformers(tmp_path: Path, store: Store) -> None:
    model = saved(store, llama, tmp_path / "base", files=False)
    address = f"{store.path}@best"
    wide = from_pretrained(address, dtype=torch.float32, attn_implementation="eager")
    assert wide.dtype == torch.float32
    assert wide.config._attn_implementation == "eager"
    assert same_bits(state_of(wide.to(torch.bfloat16)), state_of(model))
    head, told = from_pretrained(
        address, AutoModelForSequenceClassification, num_labels=5, output_loading_info=True
    )
    assert head.score.out_features == 5
    assert set(told["missing_keys"]) == {"score.weight"}
    config = LlamaConfig.from_pretrained(tmp_path / "base", use_cache=False)
    assert from_pretrained(address, LlamaForCausalLM, config=config).config.use_cache is False


def test_settings_for_generation_are_the_recorded_ones(tmp_path: Path, store: Store) -> None:
    def make() -> PreTrainedModel:
        model = llama()
        model.generation_config.max_new_tokens = 7
        return model

    saved(store, make, tmp_path / "base")
    assert from_pretrained(f"{store.path}@best").generation_config.max_new_tokens == 7


def test_no_weights_are_written_to_disk(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(store, mixtral, tmp_path / "base")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    written: list[str] = []
    original = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        written.append(self.name)
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    from_pretrained(f"{store.path}@best")
    assert written == ["config.json", "generation_config.json"]
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_commit_of_a_timeline_and_a_url(tmp_path: Path, store: Store) -> None:
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with Timeline(store, store.add_base(tmp_path / "base"), retention=KeepLast(2)) as timeline:
        train(model)
        store.pin(timeline.commit(model, step=1, files=model_files(model)), "best")
    url = (tmp_path / "remote").as_uri()
    push(store, url)
    (tmp_path / "base").rename(tmp_path / "moved")
    loaded = from_pretrained(f"{url}@best", bases=[tmp_path / "moved"])
    assert same_bits(state_of(loaded), state_of(model))


def test_damage_is_an_error_and_no_model(tmp_path: Path, store: Store) -> None:
    for make in (llama, mixtral):
        saved(store, make, tmp_path / make.__name__)
        (pack,) = Path(store.path).glob("packs/*")
        data = bytearray(pack.read_bytes())
        middle = len(data) // 2
        data[middle] ^= 1
        pack.write_bytes(data)
        with pytest.raises(CorruptedError, match="tensor"):
            from_pretrained(f"{store.path}@best")
        pack.unlink()


def test_what_cannot_be_loaded_is_refused_in_words(tmp_path: Path, store: Store) -> None:
    with pytest.raises(InvalidInputError, match="STORE@CHECKPOINT"):
        from_pretrained(store.path)
    store.pin(store.save({"w": torch.ones(3)}), "bare")
    with pytest.raises(InvalidInputError, match="files=model_files"):
        from_pretrained(f"{store.path}@bare")
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    kept = KeptModel(adapted)
    settings = {"export": kept.export_settings()}
    store.pin(store.save(kept.tensors(), metadata=settings), "adapter")
    with pytest.raises(InvalidInputError, match="AutoPeftModelForCausalLM"):
        from_pretrained(f"{store.path}@adapter")
    with pytest.raises(InvalidInputError, match="export the checkpoint"):
        from_pretrained(f"{store.path}@bare", trust_remote_code=True)
