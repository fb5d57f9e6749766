"""A small model's SAEs with text and scores, ready to be described, all from one seed."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from everyscope.base.files import write_sealed
from everyscope.base.tables import write_table
from everyscope.describe.config import DescribeConfig
from everyscope.sae.files import write_sae
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.text.blocks import read_blocks
from everyscope.text.config import TextConfig
from everyscope.text.tokenizer import load_tokenizer

CONTEXT = 24
SITES = (Site("attn_out", 0), Site("attn_out", 1), Site("mlp_out", 0), Site("mlp_out", 1), Site("resid_post", 1))
WORDS = [
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
    "open",
    "the",
    "of",
    "to",
]


def build_description(root: Path, model_folder: Path, sites: tuple[Site, ...] = SITES, num_documents: int = 60) -> DescribeConfig:
    """Text, trained SAEs (two widths, two sparsities a site) and their scores below `root`; nothing is described yet."""
    model = ModelConfig(name=str(model_folder))
    words = np.random.default_rng(0)
    (root / "text").mkdir(parents=True)
    for number in range(num_documents):
        text = " ".join(words.choice(WORDS, int(words.integers(20, 60))))
        (root / "text" / f"{number:03d}.txt").write_text(text)
    text = TextConfig(source="files", paths=(root / "text",), context=CONTEXT, held_out_fraction=0.5)
    blocks = list(read_blocks(text, load_tokenizer(str(model_folder)), "train"))
    input_ids = torch.from_numpy(np.stack([block.input_ids for block in blocks])).long()
    mask = torch.from_numpy(np.stack([block.mask for block in blocks]))
    for site, activations in capture(load_language_model(model).model, sites, input_ids).items():
        rows = activations[mask]
        for width in (24, 40):
            for number, quantile in enumerate((0.8, 0.95)):
                name = f"w{width}_{number}"
                sae = random_sae(rows, width, quantile, seed=width + number)
                write_sae(root / "train" / site.folder / name, sae, {"site": site.kind, "layer": site.layer, "width": width})
                write_scores(root / "scores" / site.folder / name, width, width * (1 - quantile))
    return DescribeConfig(
        model=model,
        text=text,
        trained=root / "train",
        scores=root / "scores",
        out=root / "descriptions",
        num_sequences=40,
        train_stride=2,
        batch_blocks=4,
        portion_batches=2,
    )


def random_sae(rows: torch.Tensor, width: int, quantile: float, seed: int) -> Sae:
    """Random directions whose latents each fire on a share of 1 - `quantile` of the rows, but for a dead one, the last."""
    directions = torch.randn(width, rows.shape[1], generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(directions, dim=1)
    mean = rows.mean(0)
    threshold = ((rows - mean) @ directions.T).quantile(quantile, dim=0).clamp(min=1e-3)
    threshold[-1] = 1e6
    return Sae(directions.T.contiguous(), directions, -directions @ mean, mean, threshold)


def write_scores(folder: Path, width: int, l0: float) -> None:
    """What describing asks of an evaluation."""
    write_sealed(folder / "metrics.json", {"width": width, "l0": l0})
    table = pyarrow.table({"firings": np.arange(width), "frequency": np.arange(width) / 1000})
    write_table(folder / "latents.parquet", table)
