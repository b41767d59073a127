"""A model that is exported is the one that was trained, with its configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from msft_store import KeepLast, Store, Timeline
from msft_store.integrations.accelerate import register, save_state
from msft_store.integrations.dcp import StorageWriter
from msft_store.integrations.hf import StoreCallback
from msft_store.integrations.model_files import model_files
from tests.support import tiny_runs
from tests.support.states import same_bits
from tests.support.tiny_runs import CHAT_TEMPLATE, make_tokenizer
from tests.support.trainers import examples, make_model, state_of

NAMES = {0: "bad", 1: "middling", 2: "good"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(tmp_path: Path, callback: StoreCallback, model: Any, **given: Any) -> Path:
    """Train two steps without an evaluation; return the export of the last commit."""
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        per_device_train_batch_size=2,
    )
    given = {"train_dataset": examples(4, 0), **given}
    Trainer(model=model, args=arguments, callbacks=[callback], **given).train()
    callback.store.export(callback.timeline.checkpoints()[-1], tmp_path / "out")
    return tmp_path / "out"


def test_a_classifier_on_a_base_without_one_has_its_head_and_labels(
    tmp_path: Path, base: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
        dtype=torch.bfloat16,
        pad_token_id=0,
    )
    rows = [{**row, "labels": torch.tensor(at % 3)} for at, row in enumerate(examples(4, 0))]
    callback = StoreCallback(tmp_path / "store", base=base)
    out = train(tmp_path, callback, model, train_dataset=rows)
    found = AutoModelForSequenceClassification.from_pretrained(out)
    assert found.config.id2label == NAMES
    assert found.config.architectures == [type(model).__name__]
    assert same_bits(state_of(found), state_of(model))
    # The base's settings for generation are none of the classifier's.
    assert (base / "generation_config.json").exists()
    assert not (out / "generation_config.json").exists()


def test_weights_that_are_wider_than_the_bases_are_not_rounded(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    out = train(tmp_path, StoreCallback(tmp_path / "store", base=base), model)
    found = AutoModelForCausalLM.from_pretrained(out)
    assert found.dtype == torch.float32
    assert same_bits(state_of(found), state_of(model))


def test_tokens_that_were_added_are_in_the_export(tmp_path: Path, base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<more>"])
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool": "{{ messages }}"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.max_new_tokens = 7
    # A setting that save_pretrained refuses ends no training.
    model.generation_config.temperature = 0.5
    callback = StoreCallback(tmp_path / "store", base=base)
    out = train(tmp_path, callback, model, processing_class=tokenizer)

    found = AutoModelForCausalLM.from_pretrained(out)
    assert same_bits(state_of(found), state_of(model))
    assert found.generation_config.max_new_tokens == 7
    told = AutoTokenizer.from_pretrained(out)
    assert told.convert_tokens_to_ids("<more>") == len(tokenizer) - 1
    assert told.chat_template == tokenizer.chat_template
    # A resume point is exported in the same way, and the files are stored once.
    point = callback.store.get(f"timelines/main-resume/{callback.store.log()[-1].id}")
    assert callback.store.files(point) == callback.store.files(callback.timeline.checkpoints()[-1])


def test_a_configuration_that_changes_is_recorded_as_it_is_at_the_commit(store: Store) -> None:
    model = make_model()
    before = model_files(model)
    model.config.use_cache = False
    model.float()
    config = json.loads(model_files(model)["config.json"])
    assert (config["use_cache"], config["dtype"]) == (False, "float32")
    assert json.loads(before["config.json"])["dtype"] == "bfloat16"
    compiled = SimpleNamespace(_orig_mod=model)
    assert model_files(compiled) == model_files(model)
    assert model_files(torch.nn.Linear(2, 2)) == model_files(None) == {}


def test_the_files_are_those_of_save_pretrained(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = {p.name: p.read_text() for p in tmp_path.iterdir() if p.suffix != ".safetensors"}
    ours = {name: data.decode() for name, data in model_files(model, tokenizer).items()}
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"chat_template.jinja"}:
        assert json.loads(ours[name]) == json.loads(theirs[name])


def test_a_tokenizer_is_beside_an_adapter(tmp_path: Path) -> None:
    # PEFT resizes a model whose tokenizer has more tokens.
    tiny_runs.write_model(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(plain, config)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }} of the adapter"
    out = train(tmp_path, StoreCallback(tmp_path / "store"), model, processing_class=tokenizer)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    found = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert same_bits(state_of(found), state_of(model))
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_a_processor_is_recorded_with_its_image_processor(tmp_path: Path, store: Store) -> None:
    pytest.importorskip("PIL")
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 11}), make_tokenizer())
    files = model_files(make_model(), processor)
    ckpt = store.save(make_model(), files=files)
    store.export(ckpt, tmp_path / "out")
    found = CLIPProcessor.from_pretrained(tmp_path / "out")
    assert found.image_processor.size["shortest_edge"] == 11
    assert len(found.tokenizer) == len(processor.tokenizer)


def test_accelerate_records_the_configuration(tmp_path: Path, store: Store) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make_model())
    timeline = Timeline(store, None, retention=KeepLast(3))
    files = model_files(None, make_tokenizer())
    register(accelerator, timeline, store, files=files)
    accelerator.save_state(str(tmp_path / "state"))
    saved = save_state(accelerator, timeline, files=files)
    for number, ckpt in enumerate((timeline.checkpoints()[0], store.get(saved))):
        store.export(ckpt, tmp_path / f"out{number}")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}")
        assert same_bits(state_of(found), state_of(model))
        assert len(AutoTokenizer.from_pretrained(tmp_path / f"out{number}")) == 259


def test_dcp_keeps_files(tmp_path: Path) -> None:
    model = make_model()
    writer = StorageWriter(tmp_path / "store", name="last", files=model_files(model))
    dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
    Store.open(tmp_path / "store").export("last", tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(state_of(found), state_of(model))


def test_code_comes_from_the_base_alone(tmp_path: Path, base: Path, store: Store) -> None:
    (base / "own.py").write_text("# code of the base")
    model = AutoModelForCausalLM.from_pretrained(base)

    class WithCode:
        def save_pretrained(self, folder: str) -> None:
            for name in ("own.py", "other.py", "tokenizer_config.json", "speech.pt"):
                Path(folder, name).write_text("{}")

    files = model_files(model, WithCode())
    ckpt = store.save(model, parent=store.add_base(base), files=files)
    store.export(ckpt, tmp_path / "out")
    assert "tokenizer_config.json" in files
    assert (tmp_path / "out" / "own.py").read_text() == "# code of the base"
    assert not (tmp_path / "out" / "other.py").exists()
    assert not (tmp_path / "out" / "speech.pt").exists()
