"""What all tests share: one thread, no network, and a tiny random model whose files lie in a folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: kernels for a GPU keep their laws here too

from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from built_once import built_once
from transformers import Gemma2Config, Gemma2ForCausalLM

from everyscope.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def forked_interpreters() -> Iterator[None]:
    """In this module interpreters start in milliseconds (tests/forked.py)."""
    with forked.forked_interpreters():
        yield


@pytest.fixture(scope="session")
def tiny_random_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Gemma 2 (2 layers, d_model 32, 4 heads of 12, 2 kv heads, context 64) and the bundled tokenizer.

    Its name is good for `ModelConfig(name=str(folder))`. Tests share it: read it, never write to it.
    """
    return built_once(tmp_path_factory, "tiny_random_model", _write_tiny_random_model)


def _write_tiny_random_model(folder: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        max_position_embeddings=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # with the usual 0.02 so small a model's logits hardly depend on its input
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
