"""A suite in the full published format, invented: quick to make at any size, and as hostile as asked.

Latent i of every SAE fires on the token i modulo the vocabulary, so that pages show something that makes sense; one in twenty
is dead. Everything follows from the seed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from everyscope.base.files import sha256, write_sealed
from everyscope.base.tables import write_table
from everyscope.sites.names import Site
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE, sae_folder
from everyscope.suite.records import Headline, MeasuredOn, SaeRecord, SuiteIndex, write_index

TEXT = """
def return self import class if else for in not None True False print len range str int list dict open read write line
value values name path file data result index count total first last next item items error raise try except with as from
the a of to and is that this it when which where each every other into over under before after between large small new
function module argument object method number string token layer latent model loss
"""
WORDS = TEXT.split()
SIGNS = [
    "(",
    ")",
    ":",
    ",",
    ".",
    "=",
    " =",
    " ==",
    "\n",
    "\n    ",
    "\n        ",
    "    ",
    "\t",
    '"',
    "'",
    "[",
    "]",
    "_",
    " #",
    "#",
    "1",
]
SPECIAL = ["<pad>", "<eos>", "<bos>"]
SCRIPT = "<script>alert('x')</script>"
HOSTILE = [
    SCRIPT.encode(),
    b'"><img src=x onerror=alert(1)>',
    b"\x00\x07\x1b[31m\x7f",
    b"\xe2\x80",
    b"\x94",
    "\u202egnihtemos".encode(),
    b"x" * 10_000,
    b"{{ 7 * 7 }}",
    b"",
]
"""Tokens that mean harm, or look like it: markup, control characters, halves of characters, direction marks, sheer length."""
GROUPS, PER_GROUP, WINDOW, PEAK = 6, 4, 32, 16
TOKEN_VALUE = [("token", pyarrow.int32()), ("value", pyarrow.float32())]


@dataclass(frozen=True)
class Shape:
    """How large, and what it has."""

    kinds: tuple[str, ...] = ("attn_out", "mlp_out", "resid_post")
    layers: int = 3
    widths: tuple[int, ...] = (512, 1024)
    l0s: tuple[float, ...] = (12.3, 25.1, 50.7)
    num_sequences: int = 96
    context: int = 128
    is_described: bool = True
    is_explained: bool = True
    is_hostile: bool = False


def vocabulary(is_hostile: bool) -> list[bytes]:
    """Special tokens first, then signs, words with and without a space, and the hostile."""
    words = [f"{space}{word}" for word in WORDS for space in ("", " ")]
    return [text.encode() for text in [*SPECIAL, *SIGNS, *words]] + (HOSTILE if is_hostile else [])


def write_invented_suite(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Write the suite; gives its folder."""
    random = np.random.default_rng(seed)
    pieces = vocabulary(shape.is_hostile)
    blocks = random_blocks(random, len(pieces), shape)
    if shape.is_described:
        write_text(folder, pieces, blocks)
    sites = [Site(kind, layer) for kind in shape.kinds for layer in range(shape.layers)]
    places = [(site, width, l0) for site in sorted(sites) for width in shape.widths for l0 in shape.l0s]
    records = []
    for number in range(len(places)):
        records.append(write_sae(folder, number, places, shape, pieces, blocks, random))
    write_slices(folder, records, random)
    measured = MeasuredOn(
        data="invented text <&>, held-out documents",
        mask="BOS, EOS, padding and prefix excluded",
        num_tokens=81_920,
        num_sequences=shape.num_sequences,
        context=shape.context,
        num_documents=77,
        interval_level=0.95,
        loss_clean=2.345,
    )
    index = SuiteIndex(
        version="0", title="Invented scope", model="tiny", measured=measured, inputs="0", saes=tuple(records), files={}
    )
    write_index(folder, index)
    return folder


def random_blocks(random: np.random.Generator, size: int, shape: Shape) -> np.ndarray:
    """Token ids [sequences, context]; every token occurs, those in front more often."""
    weights = 1.0 / (10 + np.arange(size))
    weights[:3] = 0
    blocks = random.choice(size, (shape.num_sequences, shape.context), p=weights / weights.sum())
    everywhere = random.permutation(shape.num_sequences * shape.context)[: size - 3]
    blocks.reshape(-1)[everywhere] = np.arange(3, size)[: len(everywhere)]
    blocks[:, 0] = SPECIAL.index("<bos>")
    return blocks.astype(np.int32)


def write_text(folder: Path, pieces: list[bytes], blocks: np.ndarray) -> None:
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    table = {
        "token": pyarrow.array(range(len(pieces)), pyarrow.int32()),
        "piece": pyarrow.array(pieces, pyarrow.binary()),
        "text": texts,
        "is_special": [number < len(SPECIAL) for number in range(len(pieces))],
    }
    sequences = {
        "sequence": pyarrow.array(range(len(blocks)), pyarrow.int32()),
        "split": ["held_out" if number % 4 == 0 else "train" for number in range(len(blocks))],
        "first_document": [f"package/module_{number:02d}.py" for number in range(len(blocks))],
        "input_ids": pyarrow.array(list(blocks), pyarrow.list_(pyarrow.int32())),
    }
    (folder / "text").mkdir(parents=True, exist_ok=True)
    write_table(folder / "text/vocabulary.parquet", pyarrow.table(table), compression="zstd")
    write_table(folder / "text/sequences.parquet", pyarrow.table(sequences), compression="zstd")
    model = {"model": "tiny", "revision": None, "tokenizer": "tiny", "num_layers": 3, "d_model": 128, "logit_softcap": 30.0}
    write_sealed(folder / "text/model.json", {**model, "vocab_size": len(pieces), "norm": "rms"})


def write_sae(
    folder: Path,
    number: int,
    places: list[tuple[Site, int, float]],
    shape: Shape,
    pieces: list[bytes],
    blocks: np.ndarray,
    random: np.random.Generator,
) -> SaeRecord:
    site, width, l0 = places[number]
    home = folder / sae_folder(site, width, l0)
    home.mkdir(parents=True, exist_ok=True)
    is_dead = np.arange(width) % 20 == 19
    columns = counts(width, is_dead, random)
    if shape.is_described:
        columns |= described(number, places, columns, is_dead, len(pieces), blocks, random)
    facts = {"format": 1, "num_tokens": int(blocks.size), "num_sequences": len(blocks), "context": shape.context}
    table = pyarrow.table(columns)
    if shape.is_described:
        table = table.replace_schema_metadata({"everyscope": json.dumps(facts)})
    write_table(home / LATENTS_FILE, table, compression="zstd", row_group_size=256)
    if shape.is_explained:
        write_table(home / "explanations.parquet", explanations(is_dead, pieces, random), compression="zstd")
    metrics = invented_metrics(site, width, l0, columns, random)
    write_sealed(home / METRICS_FILE, metrics)
    return SaeRecord(
        folder=home.relative_to(folder).as_posix(),
        name=f"width_{width}_l0_{round(l0)}_seed_0",
        site=site.kind,
        layer=site.layer,
        d_in=128,
        width=width,
        num_tokens=393_216,
        metrics=Headline(**{name: metrics.get(name) for name in Headline.model_fields if name in metrics}),
        files={name: sha256(home / name) for name in (METRICS_FILE, LATENTS_FILE)},
    )


def counts(width: int, is_dead: np.ndarray, random: np.random.Generator) -> dict[str, pyarrow.Array]:
    firings = np.where(is_dead, 0, np.exp(random.normal(5.5, 1.6, width)).clip(1, 60_000)).astype(np.int64)
    top = random.gamma(4.0, 2.0, width).astype(np.float32) + 0.5
    return {
        "latent": pyarrow.array(np.arange(width, dtype=np.int32)),
        "firings": pyarrow.array(firings),
        "frequency": pyarrow.array((firings / 81_920).astype(np.float32)),
        "mean_activation": pyarrow.array(top * 0.4, mask=is_dead),
        "max_activation": pyarrow.array(top, mask=is_dead),
    }


def lists(is_dead: np.ndarray, each: int, fields: dict[str, np.ndarray]) -> pyarrow.Array:
    """A list of `each` records for each living latent, none for a dead one; fields are [living * each]."""
    offsets = np.concatenate([[0], np.cumsum(np.where(is_dead, 0, each))]).astype(np.int32)
    records = pyarrow.StructArray.from_arrays([pyarrow.array(value) for value in fields.values()], list(fields))
    return pyarrow.ListArray.from_arrays(offsets, records)


def values(is_dead: np.ndarray, each: int, found: np.ndarray) -> pyarrow.Array:
    offsets = np.concatenate([[0], np.cumsum(np.where(is_dead, 0, each))]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(found.reshape(-1)))


def described(
    number: int,
    places: list[tuple[Site, int, float]],
    columns: dict[str, pyarrow.Array],
    is_dead: np.ndarray,
    vocab: int,
    blocks: np.ndarray,
    random: np.random.Generator,
) -> dict[str, pyarrow.Array]:
    living = np.flatnonzero(~is_dead)
    count = len(living)
    favourite = (living % (vocab - 3) + 3).astype(np.int32)
    top = np.asarray(columns["max_activation"].fill_null(0))[living]

    def token_values(sign: float) -> pyarrow.Array:
        sizes = sign * np.sort(random.gamma(2.0, 0.8, (count, 10)), axis=1)[:, ::-1]
        tokens = (favourite[:, None] + random.integers(0, vocab, (count, 10)) * (np.arange(10) > 0)) % vocab
        return lists(is_dead, 10, {"token": tokens.reshape(-1).astype(np.int32), "value": sizes.reshape(-1).astype(np.float32)})

    histogram = (np.exp(-np.arange(30) / 5) * random.integers(50, 5000, (count, 1))).astype(np.int32)
    share = np.sort(random.uniform(0, 1, (count, 10)), axis=1)[:, ::-1].astype(np.float32)
    tokens = ((favourite[:, None] - 3 + np.arange(10) * 7) % (vocab - 3) + 3).astype(np.int32)
    return {
        "histogram": values(is_dead, 30, histogram),
        "quantiles": values(is_dead, 6, (top[:, None] * np.array([0.05, 0.1, 0.2, 0.4, 0.6, 0.9])).astype(np.float32)),
        "examples": examples(is_dead, favourite, top, blocks, random),
        "top_logits": token_values(1.0),
        "bottom_logits": token_values(-1.0),
        "raw_top_logits": token_values(1.0),
        "raw_bottom_logits": token_values(-1.0),
        "neighbours": neighbours(number, places, is_dead, random),
        "cofiring": lists(
            is_dead,
            8,
            {
                "latent": random.integers(0, len(is_dead), count * 8).astype(np.int32),
                "count": random.integers(1, 500, count * 8).astype(np.int32),
                "phi": np.sort(random.uniform(0, 0.8, (count, 8)), axis=1)[:, ::-1].reshape(-1).astype(np.float32),
            },
        ),
        "position_profile": values(is_dead, 16, random.uniform(0, 0.02, (count, 16)).astype(np.float32)),
        "tokens": lists(
            is_dead,
            10,
            {
                "token": tokens.reshape(-1),
                "count": random.integers(1, 400, count * 10).astype(np.int32),
                "share": share.reshape(-1),
            },
        ),
        "token_entropy": pyarrow.array(random.uniform(0, 5, len(is_dead)).astype(np.float32), mask=is_dead),
        "token_predictability": pyarrow.array(random.uniform(0.5, 1, len(is_dead)).astype(np.float32), mask=is_dead),
        "held_out_firings": columns["firings"],
        "held_out_frequency": columns["frequency"],
    }


def examples(
    is_dead: np.ndarray, favourite: np.ndarray, top: np.ndarray, blocks: np.ndarray, random: np.random.Generator
) -> pyarrow.Array:
    """Windows around occurrences of each latent's token: strongest first, then five groups of falling activation."""
    count, each = len(favourite), GROUPS * PER_GROUP
    flat = blocks.reshape(-1)
    order = np.argsort(flat, kind="stable")
    starts, stops = (np.searchsorted(flat[order], favourite, side) for side in ("left", "right"))
    chosen = order[
        (starts[:, None] + random.integers(0, 2**30, (count, each)) % np.maximum(1, stops - starts)[:, None]) % len(flat)
    ]
    sequence, position = np.divmod(chosen.reshape(-1), blocks.shape[1])
    start = np.clip(position - PEAK, 1, max(1, blocks.shape[1] - WINDOW))
    group = np.tile(np.repeat(np.arange(GROUPS), PER_GROUP), count)
    level = np.where(group == 0, 1.0, 1.05 - 0.19 * group) * np.repeat(top, each) * random.uniform(0.9, 1.0, count * each)
    found = np.zeros((count * each, WINDOW), np.float16)
    rows = np.arange(count * each)
    found[rows, np.clip(position - start, 0, WINDOW - 1)] = level
    found[rows, random.integers(0, WINDOW, count * each)] += (0.3 * level).astype(np.float16)
    activations = pyarrow.ListArray.from_arrays(
        (np.arange(count * each + 1) * WINDOW).astype(np.int32), pyarrow.array(found.reshape(-1))
    )
    fields = {
        "sequence": pyarrow.array(sequence.astype(np.int32)),
        "position": pyarrow.array(position.astype(np.int32)),
        "group": pyarrow.array(group.astype(np.int8)),
        "start": pyarrow.array(start.astype(np.int32)),
        "activations": activations,
    }
    offsets = np.concatenate([[0], np.cumsum(np.where(is_dead, 0, each))]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.StructArray.from_arrays(list(fields.values()), list(fields)))


def neighbours(
    number: int, places: list[tuple[Site, int, float]], is_dead: np.ndarray, random: np.random.Generator
) -> pyarrow.Array:
    """Eight in the same SAE, and eight each in the next wider, the next narrower, the previous layer's and the next's."""
    site, width, l0 = places[number]
    widths = sorted({place[1] for place in places})
    place = widths.index(width)
    others = [(0, number)]
    for relation, other in (
        (1, (site, widths[place + 1], l0) if place + 1 < len(widths) else None),
        (2, (site, widths[place - 1], l0) if place else None),
        (3, (Site(site.kind, site.layer - 1), width, l0) if site.layer else None),
        (4, (Site(site.kind, site.layer + 1), width, l0)),
    ):
        if other in places:
            others.append((relation, places.index(other)))
    count, each = int((~is_dead).sum()), 8 * len(others)
    sizes = np.repeat([places[other][1] for _, other in others], 8)
    cosines = np.sort(random.beta(2, 3, (count, len(others), 8)), axis=2)[:, :, ::-1]
    fields = {
        "relation": np.tile(np.repeat([relation for relation, _ in others], 8), count).astype(np.int8),
        "sae": np.tile(np.repeat([other for _, other in others], 8), count).astype(np.int32),
        "latent": (random.integers(0, 2**30, (count, each)) % sizes).reshape(-1).astype(np.int32),
        "cosine": cosines.reshape(-1).astype(np.float32),
    }
    return lists(is_dead, each, fields)


def explanations(is_dead: np.ndarray, pieces: list[bytes], random: np.random.Generator) -> pyarrow.Table:
    living = np.flatnonzero(~is_dead)
    texts = [pieces[latent % (len(pieces) - 3) + 3].decode("utf-8", "replace")[:40] for latent in living]
    detection, fuzzing = random.uniform(0.6, 1.0, (2, len(living))).astype(np.float32)
    return pyarrow.table(
        {
            "latent": living.astype(np.int32),
            "label": [f"the token {text.strip() or text!r}, in code" for text in texts],
            "method": ["offline statistics"] * len(living),
            "kind": ["none" if latent % 7 == 3 else "token" for latent in living],
            "detection": detection,
            "detection_low": detection - 0.05,
            "detection_high": np.minimum(1.0, detection + 0.04),
            "detection_null": random.uniform(0.47, 0.53, len(living)).astype(np.float32),
            "fuzzing": fuzzing,
            "fuzzing_low": fuzzing - 0.06,
            "fuzzing_high": np.minimum(1.0, fuzzing + 0.05),
            "fuzzing_null": random.uniform(0.47, 0.53, len(living)).astype(np.float32),
            "num_scored": pyarrow.array([120] * len(living), pyarrow.int32()),
        }
    )


def invented_metrics(site: Site, width: int, l0: float, columns: dict[str, pyarrow.Array], random: np.random.Generator) -> dict:
    """metrics.json in full."""
    fvu = float(0.9 * l0**-0.45 * (512 / width) ** 0.12 * (1 + 0.1 * site.layer))
    delta = float(0.5 * fvu * (1 + random.uniform(0, 0.1)))
    frequency = np.asarray(columns["frequency"])
    logs = np.histogram(np.log10(frequency[frequency > 0]), bins=40, range=(-6, 0))
    positions = [0, 1, 2, 4, 8, 16, 32, 64, 127]
    return {
        "site": site.kind,
        "layer": site.layer,
        "d_in": 128,
        "width": width,
        "l0": l0,
        "fvu": fvu,
        "fvu_pca": float(min(1.0, 1.9 * l0**-0.4 * (1 + 0.1 * site.layer))),
        "delta_loss": delta,
        "loss_recovered": 1 - delta / 8,
        "is_canonical": 20 < l0 < 30,
        "kl": delta * 0.9,
        "cosine": 1 - fvu / 2,
        "l2_ratio": 0.97,
        "mse": 40 * fvu,
        "loss_clean": 2.345,
        "loss_spliced": 2.345 + delta,
        "loss_mean_ablated": 10.1,
        "loss_zero_ablated": 11.7,
        "dead_fraction": float((frequency == 0).mean()),
        "dense_fraction": float((frequency > 0.1).mean()),
        "num_tokens": 81_920,
        "num_documents": 77,
        "data": "invented text <&>, held-out documents",
        "mask": "BOS, EOS, padding and prefix excluded",
        "interval_level": 0.95,
        "intervals": {
            "l0": [l0 * 0.98, l0 * 1.02],
            "fvu": [fvu * 0.96, fvu * 1.05],
            "delta_loss": [delta * 0.9, delta * 1.1],
            "loss_recovered": [1 - delta / 7, 1 - delta / 9],
        },
        "baselines_fvu": {"mean": 1.0, "pca": min(1.0, fvu * 2.2), "random_dictionary": 0.93, "neuron_basis": 0.71},
        "baselines": {
            "zero": {"fvu": 1.3, "l0": 0, "delta_loss": 9.3},
            "mean": {"fvu": 1.0, "l0": 0, "delta_loss": 7.7},
            "pca": {"fvu": min(1.0, fvu * 2.2), "l0": l0, "delta_loss": delta * 4},
            "random_dictionary": {"fvu": 0.93, "l0": l0, "delta_loss": 5.2},
            "neuron_basis": {"fvu": 0.71, "l0": l0, "delta_loss": 3.1},
        },
        "by_position": {
            "position": positions,
            "count": [640] * len(positions),
            "error": [None, *(1.0 * fvu for _ in positions[1:])],
            "fvu": [None, *(fvu * (1 - 0.6 / (place + 1)) for place in positions[1:])],
            "delta_loss": [None, *(delta * (1 - 0.4 / (place + 1)) for place in positions[1:])],
            "loss_count": [640] * len(positions),
        },
        "firing": {
            "log10_edges": logs[1].tolist(),
            "counts": logs[0].tolist(),
            "dead": float((frequency == 0).mean()),
            "dense_1": float((frequency > 0.01).mean()),
            "dense_10": float((frequency > 0.1).mean()),
            "dense_10_share_of_l0": 0.21,
        },
    }


def write_slices(folder: Path, records: list[SaeRecord], random: np.random.Generator) -> None:
    """Comparisons: widths, kinds of text, and feature splitting between the first two widths at one site."""
    rows = [
        {"site": str(record.where), "sae": record.folder, "l0": record.metrics.l0, "fvu": record.metrics.fvu}
        for record in records
    ]
    write_sealed(folder / "slices/subsets.json", {"subsets": [{"name": "code", "num_tokens": 4096, "rows": rows[:6]}]})
    wide = next((record for record in records if record.where == records[0].where and record.width > records[0].width), None)
    if wide is None:
        return
    narrow = records[0]
    table = "splitting/pair.parquet"
    shares = {"matched": 0.4, "split": 0.35, "new": 0.25, "null": {"matched": 0.01, "split": 0.02, "new": 0.97}}
    pair = {"site": str(narrow.where), "narrow": narrow.folder, "wide": wide.folder, **shares, "threshold": 0.42, "table": table}
    write_sealed(folder / "slices/splitting.json", {"pairs": [pair]})
    (folder / "slices/splitting").mkdir()
    count = 200
    found = {
        "narrow": random.integers(0, narrow.width, count).astype(np.int32),
        "wide": random.integers(0, wide.width, count).astype(np.int32),
        "cosine": random.uniform(0.4, 1, count).astype(np.float32),
        "null_p": random.uniform(0, 0.01, count).astype(np.float32),
        "cofiring": random.uniform(0, 1, count).astype(np.float32),
        "conditional": random.uniform(0, 1, count).astype(np.float32),
        "relation": ["matched" if place % 2 else "split" for place in range(count)],
    }
    write_table(folder / "slices" / table, pyarrow.table(found))
