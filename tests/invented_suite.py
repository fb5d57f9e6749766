"""Invented suites of which every number follows from arithmetic alone: the same on every machine and with every numpy."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from everyscope.base.files import sha256, write_json, write_sealed
from everyscope.base.tables import write_table
from everyscope.sites.names import Site
from everyscope.suite.layout import CONFIG_FILE, EXPLANATIONS_FILE, LATENTS_FILE, sae_folder
from everyscope.suite.records import Headline, Intervals, MeasuredOn, SaeRecord, SuiteIndex, write_index

WORDS = ["<pad>", "<eos>", "<bos>", "def", " return", " self", "(", ")", ":", "\n    ", " the", " of", "é", "—"]
HOSTILE = ["\0", "a\0b", "\\u0000", "\\\\u0000", "\ufffd", '"', "\\", "</script>", "\u2028", "\u202e", "x" * 10_000, ""]
"""Tokens that JSON, Postgres or its importer stumble over, and one without any text."""
BINS, TOP, FIFTHS, DEAD = 30, 2, 5, 6


@dataclass(frozen=True)
class Shape:
    """One SAE."""

    site: Site
    width: int
    l0: float
    is_canonical: bool = True
    is_explained: bool = True


@dataclass(frozen=True)
class SuiteShape:
    """How large a suite is."""

    saes: tuple[Shape, ...]
    tokens: tuple[str, ...] = tuple(WORDS + HOSTILE)
    blocks: int = 3
    context: int = 24
    window: int = 8
    examples: int = TOP + FIFTHS
    is_described: bool = True


GOLDEN = SuiteShape(
    (
        Shape(Site("attn_out", 1), 6, 2.0),
        Shape(Site("resid_post", 0), 6, 2.2, is_explained=False),
        Shape(Site("resid_post", 0), 6, 4.1, is_canonical=False),
    )
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers in [0, 1) that look random: splitmix64 of their places."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed * 1_000_003)
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64).reshape(shape) / 2**53


def drawn(count: int, below: int, seed: int) -> np.ndarray:
    return (noise(count, seed=seed) * below).astype(np.int64)


def write_suite(folder: Path, shape: SuiteShape) -> Path:
    """Write the suite, with everything an export reads; gives its folder."""
    write_text(folder / "text", shape)
    records = [write_sae(folder, number, shape) for number in range(len(shape.saes))]
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted((folder / "text").iterdir())}
    measured = MeasuredOn(
        data="invented text",
        mask="nothing",
        num_tokens=1000,
        num_sequences=shape.blocks,
        context=shape.context,
        num_documents=4,
        interval_level=0.95,
        loss_clean=2.5,
    )
    index = SuiteIndex(
        version="0", title="Golden scope", model="org/Some-Model", measured=measured, inputs="0", saes=tuple(records), files=files
    )
    write_index(folder, index)
    return folder


def write_text(folder: Path, shape: SuiteShape) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"token": pyarrow.array(range(len(shape.tokens)), pyarrow.int32()), "text": list(shape.tokens)}
    write_table(folder / "vocabulary.parquet", pyarrow.table(vocabulary))
    ids = drawn(shape.blocks * shape.context, len(shape.tokens), 1).reshape(shape.blocks, shape.context)
    half = shape.context // 2
    sequences = {
        "sequence": pyarrow.array(range(shape.blocks), pyarrow.int32()),
        "input_ids": pyarrow.array(ids.tolist(), pyarrow.list_(pyarrow.int32())),
        "document_starts": pyarrow.array([[0, half] for _ in range(shape.blocks)], pyarrow.list_(pyarrow.int32())),
        "documents": [[f"doc_{number}.py", f'doc_{number}"b.py'] for number in range(shape.blocks)],
    }
    write_table(folder / "sequences.parquet", pyarrow.table(sequences))
    write_sealed(folder / "model.json", {"num_layers": 3, "d_model": 16})


def write_sae(folder: Path, number: int, shape: SuiteShape) -> SaeRecord:
    sae = shape.saes[number]
    home = folder / sae_folder(sae.site, sae.width, sae.l0)
    home.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(latent_columns(sae.width, number, shape))
    facts = {"num_sequences": shape.blocks, "context": shape.context, "logit_path": "final norm's gain"}
    if shape.is_described:
        table = table.replace_schema_metadata({"everyscope": json.dumps(facts)})
    else:
        table = table.select(["latent", "firings", "frequency", "max_activation"])
    write_table(home / LATENTS_FILE, table, row_group_size=256)
    hook = f"blocks.{sae.site.layer}.hook_{sae.site.kind}"
    write_json(home / CONFIG_FILE, {"architecture": "jumprelu", "d_sae": sae.width, "metadata": {"hook_name": hook}})
    if sae.is_explained:
        write_table(home / EXPLANATIONS_FILE, label_table(sae.width))
    return SaeRecord(
        folder=home.relative_to(folder).as_posix(),
        name=f"sae_{number}",
        site=sae.site.kind,
        layer=sae.site.layer,
        d_in=16,
        width=sae.width,
        num_tokens=None,
        metrics=headline(sae),
        files={path.name: sha256(path) for path in sorted(home.iterdir())},
    )


def headline(sae: Shape) -> Headline:
    return Headline(
        l0=sae.l0,
        fvu=0.25,
        fvu_usual=0.25,
        fvu_pca=0.5,
        fvu_pca_usual=0.5,
        num_massive_tokens=0,
        delta_loss=0.125,
        loss_recovered=0.9,
        kl=0.1,
        cosine=0.9,
        dead_fraction=1 / 6,
        dense_fraction=0.0,
        intervals=Intervals(l0=None, fvu=None, fvu_usual=None, delta_loss=None, loss_recovered=None),
        baselines_fvu={},
        is_canonical=sae.is_canonical,
    )


def latent_columns(width: int, seed: int, shape: SuiteShape) -> dict[str, pyarrow.Array]:
    """Every sixth latent is dead. The others' activations lie evenly between 0 and their maximum."""
    is_dead = np.arange(width) % DEAD == DEAD - 1
    firings = np.where(is_dead, 0, 30 + drawn(width, 90, seed + 2))
    top = (1 + 8 * noise(width, seed=seed + 3)).astype(np.float32)
    alive = np.flatnonzero(~is_dead)
    heights = firings[alive, None] // BINS + (np.arange(BINS) >= BINS - firings[alive, None] % BINS)

    def structs(each: int, fields: dict[str, np.ndarray]) -> pyarrow.Array:
        records = pyarrow.StructArray.from_arrays([pyarrow.array(value.ravel()) for value in fields.values()], list(fields))
        return pyarrow.ListArray.from_arrays(offsets(is_dead, each), records)

    def logits(sign: float, seed: int) -> pyarrow.Array:
        tokens = drawn(len(alive) * 3, len(shape.tokens), seed).astype(np.int32)
        values = sign * np.sort(noise(len(alive), 3, seed=seed), axis=1)[:, ::-1]
        return structs(3, {"token": tokens, "value": values.astype(np.float32)})

    near = {"relation": np.tile([0, 0, 1], len(alive)).astype(np.int8), "sae": np.zeros(3 * len(alive), np.int32)}
    near |= {"latent": drawn(3 * len(alive), width, seed + 6).astype(np.int32)}
    near |= {"cosine": noise(3 * len(alive), seed=seed + 6).astype(np.float32)}
    company = {"latent": (alive + 1) % width, "count": firings[alive] // 2, "phi": noise(len(alive), seed=7).astype(np.float32)}
    return {
        "latent": pyarrow.array(np.arange(width, dtype=np.int32)),
        "firings": pyarrow.array(firings, pyarrow.int64()),
        "frequency": pyarrow.array((firings / 1000).astype(np.float32)),
        "max_activation": pyarrow.array(top, mask=is_dead),
        "histogram": pyarrow.ListArray.from_arrays(offsets(is_dead, BINS), pyarrow.array(heights.ravel().astype(np.int32))),
        "examples": examples(is_dead, firings[alive], top[alive], shape, seed),
        "top_logits": logits(1.0, seed + 4),
        "bottom_logits": logits(-1.0, seed + 5),
        "neighbours": structs(3, near),
        "cofiring": structs(
            1, {name: value.astype(np.float32 if name == "phi" else np.int32) for name, value in company.items()}
        ),
    }


def offsets(is_dead: np.ndarray, each: int) -> pyarrow.Array:
    return pyarrow.array(np.concatenate([[0], np.cumsum(np.where(is_dead, 0, each))]), pyarrow.int32())


def examples(is_dead: np.ndarray, firings: np.ndarray, top: np.ndarray, shape: SuiteShape, seed: int) -> pyarrow.Array:
    """Two of the strongest, and one from the middle of each fifth; or as many of them as the shape says."""
    count, each = len(top), shape.examples
    group = np.concatenate([np.zeros(TOP), np.arange(1, FIFTHS + 1)])[:each].astype(np.int8)
    level = np.where(group == 0, 1.0, 1 - (np.maximum(group, 1) - 0.5) / FIFTHS)
    own = (level * top[:, None]).astype(np.float16)
    block = drawn(count * each, shape.blocks, seed + 8)
    start = drawn(count * each, shape.context - shape.window, seed + 9)
    place = drawn(count * each, shape.window, seed + 10)
    values = np.zeros((count * each, shape.window), np.float16)
    values[np.arange(count * each), place] = own.ravel()
    values[np.arange(count * each), (place + 1) % shape.window] = own.ravel() / 2
    ends = pyarrow.array(np.arange(count * each + 1) * shape.window, pyarrow.int32())
    fields = {
        "sequence": pyarrow.array(block, pyarrow.int32()),
        "position": pyarrow.array(start + place, pyarrow.int32()),
        "group": pyarrow.array(np.tile(group, count)),
        "start": pyarrow.array(start, pyarrow.int32()),
        "activations": pyarrow.ListArray.from_arrays(ends, pyarrow.array(values.ravel())),
    }
    return pyarrow.ListArray.from_arrays(
        offsets(is_dead, each), pyarrow.StructArray.from_arrays(list(fields.values()), list(fields))
    )


def label_table(width: int) -> pyarrow.Table:
    """A label for every living latent, and a second one for every fourth."""
    latents = [latent for latent in range(width) if latent % DEAD != DEAD - 1 for _ in range(2 if latent % 4 == 0 else 1)]
    labels = [f"label {place} of `\0` and \\u0000" for place in range(len(latents))]
    scores = {
        f"{score}{suffix}": [0.75 for _ in latents] for score in ("detection", "fuzzing") for suffix in ("", "_low", "_high")
    }
    nulls = {f"{score}_null": [0.5 for _ in latents] for score in ("detection", "fuzzing")}
    table = {
        "latent": latents,
        "label": labels,
        "method": ["offline statistics" for _ in latents],
        "kind": ["token" for _ in latents],
        **scores,
        **nulls,
    }
    return pyarrow.table(table)
