"""A complete little run on disk, short of evaluation: model, tokenizer, text, shards and untrained SAEs, all from one seed."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.files import write_sae
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site, sites_of
from everyscope.text.blocks import read_blocks
from everyscope.text.config import TextConfig
from everyscope.text.tokenizer import load_tokenizer

CONTEXT = 24
SITES = sites_of(("embed", "attn_out", "mlp_out", "resid_post"), None, num_layers=2)
ALPHABET = [
    "import",
    "self",
    "return",
    "value",
    "for",
    "in",
    "name",
    "def",
    "class",
    "None",
    "print",
    "list",
    "string",
    "path",
    "open",
    "the",
    "of",
    "a",
    "to",
    "is",
    "and",
]


def tiny_gemma(vocab_size: int = 4096) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        sliding_window=8,
        max_position_embeddings=64,
        query_pre_attn_scalar=10,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )
    return Gemma2ForCausalLM(config).eval().requires_grad_(False)


def random_sae(d_in: int, width: int, threshold: float, mean: Tensor, seed: int) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(width, d_in, generator=generator), dim=1)
    W_enc = W_dec.T.contiguous() * 0.5
    return Sae(W_enc, W_dec, -mean @ W_enc, mean, torch.full((width,), threshold))


def identity_sae(d_in: int) -> Sae:
    """x = relu(x) - relu(-x), exactly: every sum has one summand that is not 0."""
    eye = torch.eye(d_in)
    both = torch.cat([eye, -eye], dim=1)
    return Sae(both, both.T.contiguous(), torch.zeros(2 * d_in), torch.zeros(d_in), torch.zeros(2 * d_in))


def write_shards(folder: Path, site: Site, rows: Tensor) -> None:
    places = np.arange(len(rows))
    path = shard_path(folder, 0)
    with new_activation_shard(path, str(site), len(rows), rows.shape[1], "float32", CONTEXT, {}) as shard:
        shard.put(rows, places, np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32))
    seal_folder(folder, 1, site=site.folder, config={}, parents={}, version="0")


def build_scope(root: Path, sites: tuple[Site, ...] = SITES, num_documents: int = 60) -> EvaluateConfig:
    """Write everything below `root`; two SAEs at each site."""
    model, tokenizer = tiny_gemma(), load_tokenizer("tiny")
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    words = np.random.default_rng(0)
    (root / "text").mkdir()
    for number in range(num_documents):
        text = " ".join(words.choice(ALPHABET, int(words.integers(20, 60))))
        (root / "text" / f"{number:03d}.txt").write_text(text)
    text = TextConfig(source="files", paths=(root / "text",), context=CONTEXT, held_out_fraction=0.5)
    blocks = list(read_blocks(text, tokenizer, "train"))
    input_ids = torch.from_numpy(np.stack([block.input_ids for block in blocks])).long()
    mask = torch.from_numpy(np.stack([block.mask for block in blocks]))
    for site, activations in capture(model, sites, input_ids).items():
        rows = activations[mask]
        write_shards(root / "shards" / site.folder, site, rows)
        spread = float((rows - rows.mean(0)).std())
        for number, threshold in enumerate((0.4, 0.9)):
            sae = random_sae(rows.shape[1], 32, threshold * spread, rows.mean(0), seed=number)
            record = {
                "site": site.kind,
                "layer": site.layer,
                "width": 32,
                "num_tokens": 1000,
                "config": {"sparsity_coefficient": 0.1},
            }
            write_sae(root / "train" / site.folder / f"w32_{number}", sae, record)
    return EvaluateConfig(
        model=ModelConfig(name=str(root / "model")),
        text=text,
        shards=root / "shards",
        trained=root / "train",
        out=root / "scores",
        num_sequences=40,
        batch_blocks=4,
        checkpoint_batches=1,
        uniformity_sequences=4,
        gradient_blocks=2,
        baseline_sequences=8,
        resamples=200,
    )


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file below `root`, by path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def score_bytes(root: Path) -> dict[str, bytes]:
    """Every file below a scores folder but cost.json, which tells seconds."""
    return {name: content for name, content in tree_bytes(root).items() if name != "cost.json"}
