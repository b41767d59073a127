"""Keep all that is trained: beside an adapter, outside of the model, and where hooks drop it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from msft_store import InvalidInputError, KeepLast, MismatchError, Store
from msft_store.integrations.hf import StoreCallback
from msft_store.integrations.hf.peft import KeptModel
from msft_store.integrations.hf.trainer_checks import find_ignored_options
from tests.support.states import State, same_bits
from tests.support.trainers import Watch, examples, losses, make_model, make_trainer

LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


class Normed(torch.nn.Module):
    """A head that counts what it sees: a batch norm, a plain buffer and extra state."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = torch.nn.BatchNorm1d(64)
        self.register_buffer("fixed", torch.ones(3))
        self.seen = torch.nn.Module()
        self.seen.register_buffer("count", torch.zeros(()))
        self.rows = 0
        self.requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.inner(hidden)
        if self.training:
            self.rows += len(hidden)
            self.seen.count += len(hidden)
        return self.norm(logits.flatten(0, -2)).view_as(logits)

    def get_extra_state(self) -> dict[str, int]:
        return {"rows": self.rows}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.rows = state["rows"]


def by_hand() -> Any:
    model = get_peft_model(make_model().float(), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed_tokens" in name:
            parameter.requires_grad = True
    return model


def counting() -> Any:
    base: Any = make_model().float()
    base.lm_head = Normed(base.lm_head)
    return get_peft_model(base, LoraConfig(**LORA))


def two_adapters(order: tuple[str, str] = ("one", "two")) -> Any:
    model = get_peft_model(make_model().float(), LoraConfig(**LORA), adapter_name="one")
    model.add_adapter("two", LoraConfig(**LORA))
    model.base_model.set_adapter(list(order))
    return model


def prompts(kind: Any, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        base = make_model().float()
        return get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=2, **options))

    return make


def vector_bank() -> Any:
    config = VBLoRAConfig(
        r=2,
        target_modules=["q_proj"],
        num_vectors=16,
        vector_length=8,
        topk=2,
        save_only_topk_weights=True,
    )
    return get_peft_model(make_model().float(), config)


def all_of(model: torch.nn.Module) -> State:
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def spoil(model: torch.nn.Module) -> None:
    """Change all that is trained, so that only a restore brings it back."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


def run(
    folder: Path, model: torch.nn.Module, fail: int | None = None, **options: Any
) -> tuple[Trainer, StoreCallback]:
    callback = StoreCallback(folder / "store", retention=KeepLast(9))
    trainer = make_trainer(
        folder / "run",
        model,
        [callback, *([Watch(fail)] if fail else [])],
        **{"max_steps": 3, "save_steps": 1, "eval_strategy": "no", **options},
    )
    place = callback.resume(folder / "run")
    if fail is None:
        trainer.train(resume_from_checkpoint=place)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer, callback


@pytest.mark.parametrize(
    "make",
    [
        by_hand,
        counting,
        two_adapters,
        vector_bank,
        prompts(PromptTuningConfig),
        prompts(PromptEncoderConfig, encoder_hidden_size=8),
        prompts(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=8),
    ],
)
def test_all_that_is_trained_beside_an_adapter_resumes(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    whole, _ = run(tmp_path / "whole", make())
    run(tmp_path / "cut", make(), fail=2)
    model = make()
    spoil(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    resumed, callback = run(tmp_path / "cut", model)

    assert same_bits(all_of(model), all_of(whole.model))
    assert losses(resumed) == losses(whole)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    if make is counting:
        head = model.base_model.model.lm_head
        assert head.rows == whole.model.base_model.model.lm_head.rows > 0
        kept = callback.store.tensors(callback.timeline.checkpoints()[-1])
        assert {name.rpartition(".")[2] for name in kept if "lm_head" in name} == {
            "count",
            "json",
            "num_batches_tracked",
            "running_mean",
            "running_var",
        }


def test_norms_and_embeddings_are_exported_with_the_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model().float().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad |= "norm" in name or "embed_tokens" in name
    spoil(model)
    store, kept = Store.create(tmp_path / "store"), KeptModel(model)
    saved = store.save(kept.tensors(), metadata={"export": kept.export_settings()})
    store.export(saved, tmp_path / "out")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bits(all_of(loaded), all_of(model))
    # With a base of bfloat16 it would not be exact.
    assert "so load with dtype=float32" in caplog.text
    alone = {name: t for name, t in kept.tensors().items() if "lora_" in name}
    caplog.clear()
    store.export(store.save(alone, metadata={"export": kept.export_settings()}), tmp_path / "alone")
    assert caplog.text == ""

    # A model that only infers is restored completely, too.
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )
    other.requires_grad_(False)
    KeptModel(other).restore(store, saved)
    assert same_bits(all_of(other), all_of(model))


def test_further_active_adapters_are_directories_of_the_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = two_adapters()
    store, kept = Store.create(tmp_path / "store"), KeptModel(model)
    saved = store.save(kept.tensors(), metadata={"export": kept.export_settings()})
    files = store.export(saved, tmp_path / "out")
    assert "load_adapter" in caplog.text
    assert tmp_path / "out" / "two" / "adapter_model.safetensors" in files
    loaded = PeftModel.from_pretrained(make_model().float(), tmp_path / "out", adapter_name="one")
    loaded.load_adapter(str(tmp_path / "out" / "two"), "two")
    assert same_bits(all_of(loaded), all_of(model))


def test_adapters_are_restored_by_their_names(tmp_path: Path) -> None:
    model = two_adapters()
    spoil(model)
    store, kept = Store.create(tmp_path / "store"), KeptModel(model)
    saved = store.save(kept.tensors(), metadata={"export": kept.export_settings()})

    other = two_adapters(("two", "one"))
    KeptModel(other).restore(store, saved)
    assert same_bits(all_of(other), all_of(model))
    single = get_peft_model(make_model().float(), LoraConfig(**LORA), adapter_name="one")
    with pytest.raises(MismatchError, match=r"has 2 adapters, \['two'\] besides the first"):
        KeptModel(single).restore(store, saved)


def test_an_adapter_that_is_trained_and_not_active_is_kept(tmp_path: Path) -> None:
    model = two_adapters()
    model.base_model.set_adapter(["one"])
    store = Store.create(tmp_path / "store")
    assert not [name for name in KeptModel(model).tensors() if "two" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad |= ".two." in name
    spoil(model)
    kept = KeptModel(model)
    saved = store.save(kept.tensors(), metadata={"export": kept.export_settings()})
    other = two_adapters()
    other.base_model.set_adapter(["one"])
    KeptModel(other).restore(store, saved)
    assert same_bits(all_of(other), all_of(model))


def of_transformers() -> Any:
    model: Any = make_model().float()
    model.add_adapter(LoraConfig(**LORA))
    model.model.norm.weight.requires_grad = True
    return model


def lora(**options: Any) -> Callable[[], Any]:
    return lambda: get_peft_model(make_model().float(), LoraConfig(**LORA, **options))


@pytest.mark.parametrize(
    "make",
    [
        of_transformers,
        lora(bias="all", use_dora=True),
        lora(modules_to_save=["lm_head", "norm"]),
        lora(modules_to_save=["embed_tokens"]),
        lora(trainable_token_indices=[1, 5]),
        lora(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
        lora(exclude_modules=[], rank_pattern={"layers.0": 1}),
        two_adapters,
    ],
)
def test_a_restore_brings_back_all_that_is_trained(
    tmp_path: Path, make: Callable[[], Any], recwarn: pytest.WarningsRecorder
) -> None:
    model = make()
    spoil(model)
    store, kept = Store.create(tmp_path / "store"), KeptModel(model)
    saved = store.save(kept.tensors(), metadata={"export": kept.export_settings()})
    before = all_of(model)
    spoil(model)
    kept.restore(store, saved)
    assert same_bits(all_of(model), before)
    other = make()
    KeptModel(other).restore(store, saved)
    assert same_bits(all_of(other), before)
    assert not [w for w in recwarn if "does not hold" in str(w.message)]


def test_what_was_kept_once_stays_kept(tmp_path: Path) -> None:
    model = counting()
    head = model.base_model.model.lm_head
    store, kept = Store.create(tmp_path / "store"), KeptModel(model)
    first = kept.tensors().keys()
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad = True
    head.seen.count += 1
    names = kept.tensors().keys()
    assert {name.rpartition(".lm_head.")[2] for name in names - first if "lm_head" in name} == {
        "seen.count"
    }
    norm.requires_grad = False
    assert kept.tensors().keys() == names
    saved = store.save(kept.tensors())
    other = counting()
    again = KeptModel(other)
    again.restore(store, saved)
    assert other.base_model.model.lm_head.seen.count == 1
    assert again.tensors().keys() == names


@pytest.mark.parametrize("name", ["../two", ".two"])
def test_an_adapter_cannot_leave_the_directory_of_an_export(tmp_path: Path, name: str) -> None:
    store = Store.create(tmp_path / "store")
    settings = {"adapter": {}, "adapters": {name: {}}}
    tensors = {"a": torch.ones(2), f"{name}/a": torch.ones(2)}
    saved = store.save(tensors, metadata={"export": settings})
    with pytest.raises(InvalidInputError, match="cannot have a directory"):
        store.export(saved, tmp_path / "out")


@pytest.mark.parametrize("make", [by_hand, two_adapters])
def test_checkpoints_that_lack_what_is_trained_are_restored_with_a_warning(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    model = make()
    spoil(model)
    store = Store.create(tmp_path / "store")
    first = model.active_adapters[0]
    weights = get_peft_model_state_dict(model, adapter_name=first)
    saved = store.save(weights)

    other = make()
    with pytest.warns(UserWarning, match=r"does not hold .*(norm\.weight|two/)"):
        KeptModel(other).restore(store, saved)
    assert same_bits(get_peft_model_state_dict(other, adapter_name=first), weights)


def test_learned_prompts_serve_a_model_that_only_infers(tmp_path: Path) -> None:
    make_model().float().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    model = get_peft_model(base, config).eval()
    store, kept = Store.create(tmp_path / "store"), KeptModel(model)
    saved = store.save(kept.tensors(), metadata={"export": kept.export_settings()})
    store.export(saved, tmp_path / "out")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    inputs = examples(1, 0)[0]["input_ids"][None]
    assert torch.equal(loaded(inputs).logits, model(inputs).logits)
    KeptModel(loaded).restore(store, saved)
    assert torch.equal(loaded(inputs).logits, model(inputs).logits)


def test_new_rows_of_a_base_without_configuration_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make() -> Any:
        base = make_model().float()
        base.resize_token_embeddings(70)
        base.name_or_path = "some/model"
        return get_peft_model(base, LoraConfig(**LORA))

    with pytest.warns(UserWarning, match="configuration of some/model is neither"):
        kept = KeptModel(make()).tensors()
    embedding = "base_model.model.model.embed_tokens.weight"
    assert kept[embedding].shape[0] == 70

    folder = tmp_path / "cache" / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for size, is_kept in ((64, True), (70, False)):
        base = make_model()
        base.config.vocab_size = size
        base.config.save_pretrained(folder / "snapshots" / ("0" * 40))
        assert (embedding in KeptModel(make()).tensors()) == is_kept


class Head(torch.nn.Module):
    """A loss of its own with weights that are not the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def __call__(self, outputs: Any, labels: Any, **kwargs: Any) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(outputs["logits"][:, :-1].mT, labels[:, 1:])
        return loss * self.scale.square().sum()


def with_head(folder: Path, fail: int | None = None, **options: Any) -> tuple[Trainer, Head]:
    model, head = make_model().float(), Head()
    groups = [{"params": list(model.parameters())}, {"params": [head.scale], "lr": 0.1}]
    callback = StoreCallback(folder / "store", **options)
    trainer = Trainer(
        model=model,
        args=make_trainer(
            folder / "run", model, [], max_steps=3, save_steps=1, eval_strategy="no"
        ).args,
        train_dataset=examples(10, 0),
        callbacks=[callback, *([Watch(fail)] if fail else [])],
        compute_loss_func=head,
        optimizers=(torch.optim.AdamW(groups, lr=1e-3), None),
    )
    place = callback.resume(folder / "run")
    if fail is None:
        with torch.no_grad():
            head.scale.mul_(3 if place else 1)
        trainer.train(resume_from_checkpoint=place)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer, head


def test_parameters_outside_of_the_model_resume(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"parameter 0\.1\.0 \(3,\).* in the resume point alone"):
        whole, head = with_head(tmp_path / "whole")
    with_head(tmp_path / "cut", fail=2)
    resumed, other = with_head(tmp_path / "cut")
    assert torch.equal(head.scale, other.scale)
    assert losses(resumed) == losses(whole)
    with pytest.raises(InvalidInputError, match=r"parameter 0\.1\.0 .*would be in no checkpoint"):
        with_head(tmp_path / "weights", resumable=False)


class Forgetful(torch.nn.Module):
    """A part whose state dict drops a parameter, or gives a rounded copy of it."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))
        self.dtype = dtype

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.dtype is not None:
            destination[f"{prefix}gain"] = self.gain.detach().to(self.dtype)


def test_a_trained_parameter_that_a_state_dict_drops_is_kept(tmp_path: Path) -> None:
    model: Any = make_model()
    model.part = Forgetful()
    store = Store.create(tmp_path / "store")
    saved, old = store.save(KeptModel(model).tensors()), store.save(model)
    assert store.tensors(saved).keys() - store.tensors(old).keys() == {"part.gain"}
    spoil(model)
    before = model.part.gain.detach().clone()
    with pytest.warns(UserWarning, match=r"does not hold part\.gain"):
        KeptModel(model).restore(store, old)
    assert torch.equal(model.part.gain, before)
    KeptModel(model).restore(store, saved)
    assert torch.equal(model.part.gain, torch.ones(3))

    model.part = Forgetful(torch.bfloat16)
    with pytest.raises(InvalidInputError, match=r"'part\.gain' is trained as torch\.float32"):
        KeptModel(model).tensors()


def test_an_optimizer_that_hides_its_state_is_named(tmp_path: Path) -> None:
    options = {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
    assert "hides its state" in "".join(find_ignored_options(args))
    args.save_only_model = True
    assert find_ignored_options(args) == []


def test_a_copy_of_a_parameter_may_have_another_form() -> None:
    model = torch.nn.Linear(2, 2)
    hook = model.register_state_dict_post_hook(
        lambda module, state, prefix, meta: state.update(weight=module.weight.double().flatten())
    )
    assert KeptModel(model).tensors()["weight"].dtype == torch.float64
    hook.remove()
