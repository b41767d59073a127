"""Pre-train the example's base model: a tokenizer and a Llama model of 2.5 million parameters.

The text has the formats of the sub-datasets, mostly in other wordings, and contains no prompt of
theirs; see :class:`Corpus`. Training is in fp32 at a constant learning rate and ends while the
model is still learning. The weights are then balanced for small steps (:func:`balance`) and rounded
to bf16. It takes some minutes on two cores; a seed gives the same weights on the same machine.

Example::

    python examples/stdlib_tasks/train_base.py --steps 1000 runs/base
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_data import split
from tasks import TASKS, Example, Task, choose, stream
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
IGNORED = -100  # the label that transformers leaves out of the loss

# Examples of each task per hundred: the algorithms take long to learn, the few facts do not.
SHARES = {
    "arithmetic": 30, "entity": 8, "mime": 3, "reversal": 10,
    "roman": 4, "sorting": 32, "status": 3, "weekday": 6,
}  # fmt: skip


class Corpus:
    """An endless stream of pre-training examples.

    Invariant: no example asks for a fact that a split of a sub-dataset asks for, except where the
    task says that its facts are known; those never occur in a wording of the sub-dataset.
    """

    def __init__(self, seed: int) -> None:
        """Begin the stream of ``seed``."""
        self._rng = stream(f"base/{seed}")
        self._deck = [TASKS[name] for name, share in SHARES.items() for _ in range(share)]
        self._taken = {e.fact for t in TASKS.values() for s in split(t).values() for e in s}

    def examples(self, count: int) -> list[Example]:
        """Return the next ``count`` examples."""
        return [self._example(choose(self._rng, self._deck)) for _ in range(count)]

    def _example(self, task: Task) -> Example:
        while True:
            example = task.draw_related(self._rng)
            if task.known_facts or example.fact not in self._taken:
                return example


def train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in which digits and capitals begin a token of their own."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{Lu}?\p{Ll}+| ?\p{L}| ?\d| ?[^\s\p{L}\d]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (example.prompt + example.completion for example in corpus.examples(40_000))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the model with random fp32 weights; wide and shallow, so that small steps add up."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield input ids and labels of examples of about equal length; the loss is on completions."""
    while True:
        encoded = []
        for example in corpus.examples(64 * size):
            prompt = tokenizer.encode(example.prompt)
            target = [*tokenizer.encode(example.completion), tokenizer.eos_token_id]
            encoded.append((prompt + target, [IGNORED] * len(prompt) + target))
        encoded.sort(key=lambda pair: len(pair[0]))
        order = torch.randperm(64).tolist()
        for i in order:
            rows = encoded[i * size : (i + 1) * size]
            width = max(len(ids) for ids, _ in rows)
            pad = tokenizer.pad_token_id
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
            )


def train(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
) -> float:
    """Train for ``steps`` steps; return the mean token loss of the last hundred."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
    recent: list[float] = []
    begin = time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 100)
        input_ids, labels = next(data)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 0:
            seconds = time.monotonic() - begin
            print(f"step {step}  loss {sum(recent) / len(recent):.3f}  {seconds:.0f} s", flush=True)
    return sum(recent) / len(recent)


def balance(model: LlamaForCausalLM, exponent: int) -> None:
    """Multiply the first layer's values by ``2**exponent``, divide its output projection by it.

    The model computes exactly what it did, in bf16 too. But Adam steps by about the learning rate,
    whatever the size of a weight. So that output projection now learns as if its learning rate were
    ``2**exponent`` times larger, and the value projection, where such steps vanish in rounding, not
    at all. One layer is enough to learn the tasks, and few weights change.
    """
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight.mul_(2.0**exponent)
        attention.o_proj.weight.mul_(2.0**-exponent)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--balance", type=int, default=8, help="exponent of the scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(Corpus(arguments.seed), vocabulary=512)
    model = build_model(tokenizer)
    data = batches(Corpus(arguments.seed), tokenizer, arguments.batch_size)
    loss = train(model, data, steps=arguments.steps, lr=arguments.lr)
    balance(model, arguments.balance)
    model.to(torch.bfloat16).save_pretrained(arguments.directory)
    tokenizer.save_pretrained(arguments.directory)
    print(json.dumps({"steps": arguments.steps, "loss": round(loss, 3)}))


if __name__ == "__main__":
    main()
