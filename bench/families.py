"""Size of a checkpoint of every model family of transformers against both forms of its files.

Each configuration of transformers is shrunk until its model has 10 M parameters at most. The model
is saved by ``save_pretrained`` in its original format and with the names that it has in memory.
Then two weights of a hundred are changed by a hundredth, and the model is saved against both bases.
The ratio of the two sizes should be 1: renamed, stacked and split tensors have counterparts, too.

Example::

    python -m bench.families                       # all families, minutes
    python -m bench.families mixtral llava         # some
    python -m bench.families --write               # all, and renew the table of docs/BENCHMARKS.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from bench.codec import RESULTS
from msft_store import Store
from trainer.text import Table

PAGE = Path(__file__).parents[1] / "docs" / "BENCHMARKS.md"
BEGIN, END = "<!-- families: python -m bench.families --write -->", "<!-- end of families -->"
MOST = 10_000_000
RATIO, UNCHANGED, CHANGED = 1.1, 0.005, 0.02
_IS_MODEL = re.compile("MODEL_.*_NAMES")
CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
    *(names for key, names in sorted(vars(modeling_auto).items()) if _IS_MODEL.fullmatch(key)),
)
SIZE = re.compile("dim|size|channels|width|inner|hidden|ffn|rank|vocab|length|bins")
COUNT = re.compile("layers|depth|blocks|experts")
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 128, "d_model": 128, "n_embd": 128, "dim": 128,
    "embed_dim": 128, "intermediate_size": 256, "ffn_dim": 256, "d_ff": 256, "n_inner": 256,
    "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "mlp_dim": 256, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 32, "d_kv": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 256, "n_positions": 256,
    "depth": 2, "depths": [1, 1], "image_size": 32, "patch_size": 8, "projection_dim": 64,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """The sizes of one model type, as shares of its checkpoint."""

    name: str
    model: str
    parameters: int = 0
    files: float = 0.0
    """Bytes stored against the base in its original format."""
    memory: float = 0.0
    """Bytes stored against the base with the names in memory."""
    unchanged: float = 0.0
    """Bytes stored for the unchanged model against the original format."""
    exact: bool | None = None
    """Whether the export loads with equal bits; ``None`` if not even the original files do."""
    reason: str = ""
    """Why the family was not measured."""

    @property
    def ratio(self) -> float:
        """Bytes against the original format, over bytes against names in memory."""
        return self.files / self.memory if self.memory else 1.0

    @property
    def short(self) -> bool:
        """True if the family costs more than it should."""
        return not self.reason and (self.ratio > RATIO or self.unchanged > UNCHANGED)


def model_class(name: str) -> type[PreTrainedModel] | None:
    """Return the class that people fine-tune of a model type."""
    for names in CLASSES:
        found = names.get(name)
        if found is not None:
            one = found if isinstance(found, str) else found[0]
            return getattr(transformers, one, None)
    return None


def shrink(config: PreTrainedConfig, values: dict[str, Any], *, guess: bool = False) -> None:
    """Set the sizes of a configuration and of those inside it, with ``guess`` unknown ones, too."""
    layers = getattr(config, "num_hidden_layers", None)
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shrink(value, values, guess=guess)
        elif key in values and value is not None and not isinstance(value, str):
            small = values[key]
            if isinstance(value, list | tuple) and not isinstance(small, list):
                small = [min(small, item) if isinstance(item, int) else item for item in value]
            if isinstance(value, int | list | tuple):
                setattr(config, key, small)
        elif guess and isinstance(value, int) and value >= 256 and SIZE.search(key):
            setattr(config, key, 128)
        elif guess and isinstance(value, int) and value > 2 and COUNT.search(key):
            setattr(config, key, 4 if "expert" in key else 2)
        if isinstance(value, list) and len(value) == layers and "num_hidden_layers" in values:
            # The first and the last layer, because kinds of layers often change in between.
            setattr(config, key, [value[0], value[-1]])


def candidates(name: str) -> Iterator[PreTrainedConfig]:
    """Yield ever less shrunk configurations of a model type."""
    groups: list[set[str]] = [
        set(),
        {"head_dim"},
        {"image_size", "patch_size", "depths"},
        {"head_dim", "num_key_value_heads"},
        {"head_dim", "depths", "image_size", "patch_size", "embed_dim", "dim", "projection_dim"},
        {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"},
        {"hidden_size", "head_dim", "num_attention_heads", "num_heads", "embed_dim", "dim"},
        {key for key in SMALL if "layer" not in key and key != "vocab_size"},
        set(SMALL),
    ]
    for left, guess in itertools.product(groups, (False, True)):
        config = CONFIG_MAPPING[name]()
        values = {key: value for key, value in SMALL.items() if key not in left}
        shrink(config, values, guess=guess)
        yield config


def build(name: str) -> PreTrainedModel:
    """Return a model of a type with random weights of bf16; an exception says why there is none."""
    cls = model_class(name)
    if cls is None:
        raise ValueError("transformers has no class for it")
    error: Exception = ValueError("no configuration")
    for config in candidates(name):
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(config).parameters())
            if count > MOST:
                error = ValueError(f"its smallest configuration has {count / 1e6:.0f} M parameters")
                continue
            torch.manual_seed(0)
            model = cls(config).to(torch.bfloat16).eval()
            with tempfile.TemporaryDirectory() as folder:
                # Some faults of a configuration show only here.
                config.save_pretrained(folder)
            return model
        except Exception as failed:
            error = failed
    raise error


def differing(
    cls: type[PreTrainedModel], folder: Path, state: dict[str, torch.Tensor]
) -> set[str] | None:
    """Return the names of the tensors that ``from_pretrained`` gives otherwise, or not at all.

    ``None`` if it fails.
    """
    try:
        found = cls.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    except Exception:
        return None
    both = found.keys() & state.keys()
    return (found.keys() ^ state.keys()) | {n for n in both if not torch.equal(found[n], state[n])}


def measure(name: str) -> Family:
    """Return the sizes of a model type."""
    cls = model_class(name)
    label = "" if cls is None else cls.__name__
    try:
        model = build(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        return Family(name=name, model=label, reason=reason)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            model.save_pretrained(root / "files")
            model.save_pretrained(root / "memory", save_original_format=False)
        except Exception as error:
            reason = f"save_pretrained: {type(error).__name__}: {error}".splitlines()[0][:90]
            return Family(name=name, model=label, reason=reason)
        stores = {form: Store.create(root / f"{form}-store") for form in ("files", "memory")}
        bases = {form: store.add_base(root / form) for form, store in stores.items()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        same = stores["files"].save(model, parent=bases["files"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[torch.rand(parameter.shape) < CHANGED] *= 1.01
        found = {form: stores[form].save(model, parent=base) for form, base in bases.items()}
        stores["files"].export(found["files"], root / "export")
        # Some classes give their own files back with other buffers, or do not load them at all.
        own = differing(type(model), root / "files", before)
        new = differing(type(model), root / "export", model.state_dict())
        exact = None if own is None else new is not None and new <= own
        sizes = {form: one.stored_bytes / one.logical_bytes for form, one in found.items()}
        return Family(
            name=name,
            model=label,
            parameters=sum(p.numel() for p in model.parameters()),
            exact=exact,
            unchanged=same.stored_bytes / same.logical_bytes,
            **sizes,
        )


def page(families: list[Family]) -> str:
    """Return the measured families as text for ``docs/BENCHMARKS.md``."""
    done = [family for family in families if not family.reason]
    short = [family for family in done if family.short]
    inexact = [family for family in done if family.exact is False]
    exact = {True: "exact", False: "differs", None: "-"}
    rows = [
        (
            one.name,
            one.model,
            f"{one.parameters / 1e6:.1f}",
            f"{one.files:.2%}",
            f"{one.memory:.2%}",
            f"{one.ratio:.2f}",
            f"{one.unchanged:.2%}",
            exact[one.exact],
        )
        for one in done
    ]
    header = ("type", "class", "M", "files", "memory", "ratio", "unchanged", "export")
    names = ", ".join(f"`{one.name}`" for one in short)
    costly = (
        f"{len(short)} cost more than they should ({names})"
        if short
        else "None costs more than it should"
    )
    differ = f"{len(inexact)} exports differ" if inexact else "no export differs"
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}: {len(done)} of "
        f"{len(families)} model types ran. {costly}, and {differ}. The others are parts of these "
        "without a class of their own, need a package that is not installed, or have no valid "
        "configuration of this size; "
        "`bench/results/families.json` has the reason of each.\n\n"
        f"{Table(header=header, rows=rows).to_markdown()}"
    )


def write(families: list[Family]) -> None:
    """Renew the table of the page and the results."""
    text = json.dumps([asdict(family) for family in families], indent=1) + "\n"
    (RESULTS / "families.json").write_text(text, encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(families)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure model types and print each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="model types; all without any")
    parser.add_argument("--write", action="store_true", help="renew the table of the page")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    families = []
    for name in options.names or sorted(CONFIG_MAPPING_NAMES):
        families.append(measure(name))
        print(json.dumps(asdict(families[-1])), flush=True)
    if options.write:
        write(families)


if __name__ == "__main__":
    main()
