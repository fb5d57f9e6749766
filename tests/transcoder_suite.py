"""A suite of given transcoders: invented scores, examples and labels around weights that load."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow
from browser.invented_suite import Shape, random_blocks, vocabulary, write_sae, write_text

from everyscope.base.files import sha256
from everyscope.base.tables import write_table
from everyscope.sae.folded import Sae
from everyscope.sites.names import Site
from everyscope.suite.records import MeasuredOn, SuiteIndex, write_index

MEASURED = MeasuredOn(
    data="invented text",
    mask="BOS, EOS, padding and prefix excluded",
    num_tokens=81_920,
    num_sequences=96,
    context=128,
    num_documents=77,
    interval_level=0.95,
    loss_clean=2.345,
)


def write_transcoder_suite(
    folder: Path, model: str, coders: Mapping[int, Sae], labels: Mapping[tuple[int, int], str] | None = None, l0: float = 24.0
) -> Path:
    """One transcoder for each layer; `labels` by layer and latent replace the invented ones."""
    random, shape = np.random.default_rng(0), Shape(kinds=("transcoder",), layers=len(coders))
    pieces = vocabulary(is_hostile=False)
    blocks = random_blocks(random, len(pieces), shape)
    write_text(folder, pieces, blocks)
    places = [(Site("transcoder", layer), coder.d_sae, l0) for layer, coder in sorted(coders.items())]
    records = []
    for number, (site, _, _) in enumerate(places):
        record = write_sae(folder, number, places, shape, pieces, blocks, random)
        coders[site.layer].save(folder / record.folder)
        if labels is not None:
            write_labels(
                folder / record.folder, {latent: text for (layer, latent), text in labels.items() if layer == site.layer}
            )
        files = {path.name: sha256(path) for path in (folder / record.folder).iterdir()}
        records.append(record.model_copy(update={"files": files, "d_in": coders[site.layer].d_in}))
    index = SuiteIndex(
        version="0", title="Transcoders", model=model, measured=MEASURED, inputs="0", saes=tuple(records), files={}
    )
    write_index(folder, index)
    return folder


def write_labels(folder: Path, labels: Mapping[int, str]) -> None:
    count = len(labels)
    table = {
        "latent": pyarrow.array(list(labels), pyarrow.int32()),
        "label": list(labels.values()),
        "method": ["offline statistics"] * count,
        "kind": ["token"] * count,
        "detection": pyarrow.array([0.9] * count, pyarrow.float32()),
        "num_scored": pyarrow.array([40] * count, pyarrow.int32()),
    }
    write_table(folder / "explanations.parquet", pyarrow.table(table), compression="zstd")
