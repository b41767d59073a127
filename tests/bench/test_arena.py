"""The arena's model, texts and counts: a GGUF file read back, rows that train, changed weights."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.arena import texts

gguf = pytest.importorskip("gguf")
from bench.arena import changes, model, msft  # noqa: E402 - they need gguf

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), "he", "Ġhe"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the halves of each head, as llama.cpp's converter does."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(source: LlamaForCausalLM, path: Path) -> None:
    """Write a model as llama.cpp does, without quantising it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(CONFIG.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    parts = {theirs: ours for ours, theirs in (model.TOP | model.LAYER).items()}
    for name, value in source.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer = re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        values = value.float()
        if name.endswith("q_proj.weight"):
            values = permute(values, CONFIG.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = permute(values, CONFIG.num_key_value_heads)
        inner = parts[name.removesuffix(".weight")] if layer is None else parts[layer[2]]
        prefix = "" if layer is None else f"blk.{layer[1]}."
        writer.add_tensor(f"{prefix}{inner}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """Return a small model with random weights, and the directory made of its GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    source = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    write_gguf(source, folder / "tiny.gguf")
    model.convert(folder / "tiny.gguf", folder / "base")
    return source, folder / "base"


def test_a_converted_model_has_the_bits_of_its_source(converted) -> None:
    source, folder = converted
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    expected = source.state_dict()
    state = found.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert found.config.rope_parameters["rope_theta"] == 100_000.0
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_converted_tokenizer_splits_digits_and_gives_texts_back(converted) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[1])

    assert tokenizer.tokenize("he he 12") == ["he", "Ġhe", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer("Tell he: é.\n").input_ids) == "Tell he: é.\n"
    assert tokenizer("<|im_end|>").input_ids == [2] == [tokenizer.eos_token_id]


def test_all_kinds_of_texts_have_enough_different_rows() -> None:
    for kind, rows in texts.read().items():
        found = [texts.characters(row) for row in rows]
        assert len(set(found)) == len(found) >= 500, kind
        assert all(texts.SHORTEST <= len(text) <= texts.LONGEST for text in found)


def test_worked_solutions_end_with_the_right_answer() -> None:
    for row in itertools.islice(texts.mathematics(), 100):
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        answer = int(re.findall(r"The answer is (\d+)\.$", row["completion"])[0])
        if "times" in row["prompt"]:
            assert answer == numbers[0] * numbers[1]
        elif "Solve" in row["prompt"]:
            assert numbers[0] * answer + numbers[1] == numbers[2]
        elif "coat" in row["prompt"]:
            assert 100 * answer == numbers[0] * (100 - numbers[1])
        else:
            assert [number % answer for number in numbers] == [0, 0]


def test_the_splits_of_the_run_have_no_text_in_common(tmp_path: Path) -> None:
    msft.write(tmp_path)

    for kind in texts.KINDS:
        lines = [
            line
            for split, size in msft.SIZES.items()
            for line in (tmp_path / f"{kind}.{split}.jsonl").read_text("utf-8").splitlines()[:size]
        ]
        assert len(set(lines)) == len(lines) == sum(msft.SIZES.values())


def test_a_weight_has_changed_if_any_of_its_bits_has(tmp_path: Path) -> None:
    embeddings, others = torch.ones(4, dtype=torch.bfloat16), torch.zeros(10, dtype=torch.bfloat16)
    old = {changes.EMBEDDINGS: embeddings, "model.norm.weight": others}
    new = {name: value.clone() for name, value in old.items()}
    new[changes.EMBEDDINGS][0] = 2
    new["model.norm.weight"][0] = -0.0
    new["model.norm.weight"][1] = float("nan")
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")

    share = changes.compare(tmp_path / "new.safetensors", tmp_path / "old.safetensors")

    assert share == changes.Share(all=100 * 3 / 14, embeddings=25.0, others=20.0)
    same = changes.compare(tmp_path / "new.safetensors", tmp_path / "new.safetensors")
    assert same == changes.Share(all=0.0, embeddings=0.0, others=0.0)
