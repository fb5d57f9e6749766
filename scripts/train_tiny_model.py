"""Train the bundled language models from scratch: a tokenizer, a small Gemma 2, and its instruction-tuned sibling.

    python scripts/train_tiny_model.py base --steps 3300     # the tokenizer and the base model
    python scripts/train_tiny_model.py it --steps 500        # the instruction-tuned sibling, from the base model
    python scripts/train_tiny_model.py card                  # measure both against baselines, write the model cards

The text is the Python standard library of the running interpreter, its held-out documents left out. Killed runs go on from
their last checkpoint in runs/tiny_model.
"""

import argparse
import math
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from everyscope.base.bundled import BUNDLED_FOLDER
from everyscope.base.files import read_json, whole_file, write_json, write_text
from everyscope.text.blocks import read_blocks
from everyscope.text.chats import chats_of
from everyscope.text.config import Split, TextConfig
from everyscope.text.corpora import read_documents
from everyscope.text.tokenizer import load_tokenizer

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXT = TextConfig(source="standard_library", context=256)
ARCHITECTURE = Gemma2Config(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
    query_pre_attn_scalar=40,
    max_position_embeddings=256,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"] * 2,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    tie_word_embeddings=True,
)
IGNORED = -100
"""A target that is not scored."""
MUON_RATE, ADAM_RATE = 0.02, 0.006


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of the training documents, with Gemma's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (doc.text for doc in read_documents(TEXT) if doc.split(TEXT.held_out_fraction) == "train")
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=ARCHITECTURE.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("backend", None)
    # transformers 5 writes the name of a class that 4 does not know; both know this one.
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def token_stream(split: Split) -> np.ndarray:
    """All tokens of a split without BOS, documents closed by EOS, int32 [tokens]."""
    tokenizer = load_tokenizer("tiny")
    blocks = [block.input_ids[1:] for block in read_blocks(TEXT, tokenizer, split)]
    return np.concatenate(blocks)


def batch_of(stream: np.ndarray, step: int, batch: int, seed: int) -> Tensor:
    """`batch` blocks at random places of the stream, each behind BOS: int64 [batch, ctx]. A function of the step alone."""
    random = np.random.default_rng((seed, step))
    length = TEXT.context - 1
    starts = random.integers(0, len(stream) - length, batch)
    blocks = np.full((batch, TEXT.context), ARCHITECTURE.bos_token_id, np.int64)
    for row, start in enumerate(starts):
        blocks[row, 1:] = stream[start : start + length]
    return torch.from_numpy(blocks)


def loss_of(model: Gemma2ForCausalLM, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not IGNORED; `targets` are aligned with `input_ids`."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)


def optimisers_of(model: Gemma2ForCausalLM, scale: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms; all rates times `scale`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE * scale, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_RATE * scale, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int) -> float:
    """Warm-up over 100 steps, flat, then a straight line to zero over the last 60 %."""
    return min((step + 1) / 100, 1.0, (steps - step) / (0.6 * steps))


def train(model: Gemma2ForCausalLM, batches, steps: int, scale: float, folder: Path) -> None:
    """Train in place from the last checkpoint in `folder` on. `batches(step)` gives (input_ids, targets)."""
    optimisers = optimisers_of(model, scale)
    first_rates = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    step = restore(model, optimisers, folder)
    model.train()
    compiled_loss = torch.compile(loss_of)
    started, first = time.monotonic(), step
    while step < steps:
        share = rate_at(step, steps)
        groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        for group, rate in zip(groups, first_rates, strict=True):
            group["lr"] = rate * share
        loss = compiled_loss(model, *batches(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0 or step == steps:
            rate = (step - first) / (time.monotonic() - started)
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  {rate:.2f} steps/s  left {(steps - step) / rate / 60:.0f} min",
                flush=True,
            )
        if step % 500 == 0 or step == steps:
            save(model, optimisers, step, folder)


def save(model: Gemma2ForCausalLM, optimisers: list[torch.optim.Optimizer], step: int, folder: Path) -> None:
    """Write weights, optimiser states and the step as one safetensors file."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimiser in enumerate(optimisers):
        for key, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimiser.{number}.{key}.{name}"] = torch.as_tensor(value)
    tensors["step"] = torch.tensor(step)
    with whole_file(folder / "checkpoint.safetensors") as partial:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial)


def restore(model: Gemma2ForCausalLM, optimisers: list[torch.optim.Optimizer], folder: Path) -> int:
    """Load the last checkpoint, if there is one, and return the step that it was written at."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimiser in enumerate(optimisers):
        state_dict, start = optimiser.state_dict(), f"optimiser.{number}."
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(start):
                key, field = name.removeprefix(start).split(".")
                state.setdefault(int(key), {})[field] = tensor
        state_dict["state"] = state
        optimiser.load_state_dict(state_dict)
    return int(tensors["step"])


def export(model: Gemma2ForCausalLM, folder: Path) -> None:
    """Write the model for `from_pretrained`, in bfloat16: half the size, and it is read back as float32."""
    model.eval()
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    with whole_file(folder / "model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    config = model.config.to_dict()
    config |= {"architectures": ["Gemma2ForCausalLM"], "dtype": "bfloat16", "attn_implementation": None, "_name_or_path": None}
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})


def train_base(steps: int, batch: int, work: Path) -> None:
    """The tokenizer, if there is none yet, and the base model."""
    folder = BUNDLED_FOLDER / "tiny"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(folder)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM._from_config(ARCHITECTURE, attn_implementation="eager")
    stream = token_stream("train")
    tokens = batch * TEXT.context * steps
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(stream):,} training tokens, {size:,} parameters, {tokens / len(stream):.1f} epochs")

    def batches(step: int) -> tuple[Tensor, Tensor]:
        blocks = batch_of(stream, step, batch, seed=1)
        return blocks, blocks

    train(model, batches, steps, 1.0, work / "base")
    export(model, folder)


def chats(split: Split) -> list[tuple[str, str]]:
    """(request, answer) pairs made from the library's functions and their docstrings, in a fixed order."""
    documents = (document for document in read_documents(TEXT) if document.split(TEXT.held_out_fraction) == split)
    return [chat for document in documents for chat in chats_of(document.text)]


def chat_tokens(split: Split) -> tuple[Tensor, Tensor]:
    """Every chat that fits into the context: input ids and targets [chats, ctx]; only the model's turn is a target."""
    tokenizer = load_tokenizer("tiny")
    inputs, targets = [], []
    for request, answer in chats(split):
        prompt = tokenizer(f"<bos><start_of_turn>user\n{request}<end_of_turn>\n<start_of_turn>model\n", add_special_tokens=False)
        reply = tokenizer(f"{answer}<end_of_turn>\n", add_special_tokens=False)
        ids, start = prompt["input_ids"] + reply["input_ids"], len(prompt["input_ids"])
        if len(ids) <= TEXT.context:
            padding = TEXT.context - len(ids)
            inputs.append(ids + [ARCHITECTURE.pad_token_id] * padding)
            targets.append([IGNORED] * start + ids[start:] + [IGNORED] * padding)
    return torch.tensor(inputs), torch.tensor(targets)


def train_it(steps: int, batch: int, work: Path) -> None:
    """The instruction-tuned sibling, from the base model."""
    base, folder = BUNDLED_FOLDER / "tiny", BUNDLED_FOLDER / "tiny-it"
    folder.mkdir(exist_ok=True)
    for path in base.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(base / "chat_template.jinja", folder)
    model = load("tiny")
    inputs, targets = chat_tokens("train")
    print(f"{len(inputs):,} chats, {steps * batch / len(inputs):.1f} epochs")

    def batches(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(np.random.default_rng((2, step)).integers(0, len(inputs), batch))
        return inputs[chosen], targets[chosen]

    train(model, batches, steps, 0.2, work / "it")
    export(model, folder)


def load(name: str) -> Gemma2ForCausalLM:
    """A bundled model in float32."""
    return Gemma2ForCausalLM.from_pretrained(BUNDLED_FOLDER / name, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def held_out_loss(model: Gemma2ForCausalLM, inputs: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy over all targets [nats/token], in float32."""
    total, count = 0.0, 0
    for ids, wanted in zip(inputs.split(16), targets.split(16), strict=True):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, wanted[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((wanted[:, 1:] != IGNORED).sum())
    return total / count


def n_gram_loss(order: int, train_tokens: list[int], test_tokens: list[int], discount: float = 0.75) -> float:
    """An n-gram model with interpolated absolute discounting down to add-one unigrams [nats/token]."""
    counts = [Counter(zip(*(train_tokens[i:] for i in range(n)), strict=False)) for n in range(1, order + 1)]
    followers = [Counter(gram[:-1] for gram in counter) for counter in counts]
    contexts: list[Counter] = []
    for counter in counts:
        context: Counter = Counter()
        for gram, times in counter.items():
            context[gram[:-1]] += times
        contexts.append(context)
    total, vocabulary = 0.0, ARCHITECTURE.vocab_size
    for place in range(order - 1, len(test_tokens)):
        gram = tuple(test_tokens[place - order + 1 : place + 1])
        probability = (counts[0][gram[-1:]] + 1) / (len(train_tokens) + vocabulary)
        for n in range(2, order + 1):
            part = gram[-n:]
            seen = contexts[n - 1][part[:-1]]
            if seen:
                rest = discount * followers[n - 1][part[:-1]] / seen
                probability = max(counts[n - 1][part] - discount, 0) / seen + rest * probability
        total -= math.log(probability)
    return total / (len(test_tokens) - order + 1)


def blocks_of(split: Split) -> tuple[Tensor, Tensor]:
    """All blocks of a split, and their masked targets [blocks, ctx]."""
    blocks = list(read_blocks(TEXT, load_tokenizer("tiny"), split))
    inputs = torch.from_numpy(np.stack([block.input_ids for block in blocks])).long()
    masks = torch.from_numpy(np.stack([block.mask for block in blocks]))
    return inputs, torch.where(masks, inputs, IGNORED)


def write_cards() -> None:
    """Measure both models on held-out documents and write their model cards."""
    train_tokens, test_tokens = token_stream("train").tolist(), token_stream("held_out").tolist()
    n_grams = {n: n_gram_loss(n, train_tokens, test_tokens) for n in (1, 2, 3)}
    base, tuned = load("tiny"), load("tiny-it")
    text, chat = blocks_of("held_out"), chat_tokens("held_out")
    losses = {
        "uniform": math.log(ARCHITECTURE.vocab_size),
        "unigram": n_grams[1],
        "bigram": n_grams[2],
        "trigram": n_grams[3],
        "tiny": held_out_loss(base, *text),
        "tiny-it": held_out_loss(tuned, *text),
        "tiny, answers": held_out_loss(base, *chat),
        "tiny-it, answers": held_out_loss(tuned, *chat),
    }
    for name, loss in losses.items():
        print(f"{name:>18}: {loss:.3f} nats/token")
    rows = "\n".join(
        f"| {name} | {losses[name]:.3f} |" for name in ("uniform", "unigram", "bigram", "trigram", "tiny", "tiny-it")
    )
    facts = {
        "rows": rows,
        "parameters": f"{sum(p.numel() for p in base.parameters()):,}",
        "train_tokens": f"{len(train_tokens):,}",
        "test_tokens": f"{len(test_tokens):,}",
        "chats": f"{len(chat[0]):,}",
        "base_chat": f"{losses['tiny, answers']:.3f}",
        "it_chat": f"{losses['tiny-it, answers']:.3f}",
    }
    for name, card in (("tiny", BASE_CARD), ("tiny-it", IT_CARD)):
        write_text(BUNDLED_FOLDER / name / "README.md", card.format(**facts))


BASE_CARD = """# tiny

A language model small enough to ship inside a Python package, and awkward enough to be worth a scope: Gemma 2's
architecture with everything that makes it hard to hook (norms before and after each sublayer, soft-capped attention and
logits, sliding and global attention in turn, grouped queries, heads x head_dim = 160 beside d_model = 128).

{parameters} parameters, 4 layers, context 256, byte-level BPE of 4,096 tokens, stored in bfloat16. Trained from scratch by
`scripts/train_tiny_model.py` on the Python standard library: {train_tokens} tokens of training documents. It writes
plausible Python, not correct Python.

Loss on the {test_tokens} tokens of the held-out documents (5 % of the library's files, by a hash of their content):

| model | nats/token |
| --- | --- |
{rows}

The n-grams interpolate by absolute discounting and read the same training tokens. Measured by
`python scripts/train_tiny_model.py card`. The text is under the PSF licence; the weights come under Apache-2.0.
"""
IT_CARD = """# tiny-it

`tiny`, tuned to answer: tasks made from the library's functions and their docstrings, in
Gemma's turns. It is there to study how a base model's SAEs transfer, not to be talked to.

Tasks: write a docstring for a function, name the function that a description fits, write a function's body. Loss on the
answers to {chats} requests about functions of held-out documents: {it_chat} nats/token, against {base_chat} for `tiny`.

| model | nats/token on held-out text |
| --- | --- |
{rows}

Measured by `python scripts/train_tiny_model.py card`.
"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "it", "card"])
    parser.add_argument("--steps", type=int, default=3300, help="updates; 3300 made the bundled base model, 500 its sibling")
    parser.add_argument("--batch", type=int, default=16, help="blocks of 256 tokens per update")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_model"), help="folder of checkpoints")
    args = parser.parse_args()
    if args.what == "base":
        train_base(args.steps, args.batch, args.work)
    elif args.what == "it":
        train_it(args.steps, args.batch, args.work)
    else:
        write_cards()
