"""The examples of some latents: their windows cut to length, their extremes, and the bin of values that each stands for.

The strongest examples are a group of their own, which Neuronpedia marks by a bin from -1. The others were drawn from fifths of a
latent's firings, and their bins are those fifths: true quantiles, of firings alone. Where two fifths meet is read off the
histogram (within a thirtieth of the maximum) and then moved, where it must be, between the examples on both sides.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped

from everyscope.base.errors import DamagedData
from everyscope.publish.neuronpedia.latents import LatentRange, entries, list_lengths
from everyscope.publish.neuronpedia.text import SuiteText

FIFTHS = 5
MAX_TOKENS = 1024
"""Tokens of an example that the API takes [tokens]."""
BEFORE = 0.6
"""Share of a window that is too long which is kept before its own token [1]."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of some latents, latent by latent; every field is [examples] unless it says otherwise."""

    counts: Int[np.ndarray, " latents"]
    """How many each latent has."""
    group: Int[np.ndarray, " examples"]
    """0 for the strongest, else the number of the fifth."""
    block: Int[np.ndarray, " examples"]
    start: Int[np.ndarray, " examples"]
    """Where in the text the window begins."""
    own: Int[np.ndarray, " examples"]
    """Place in the window of the token that the example was chosen for."""
    lengths: Int[np.ndarray, " examples"]
    tokens: Int[np.ndarray, " places"]
    """Ids of all windows' tokens, one behind the other."""
    values: Float[np.ndarray, " places"]
    """Their activations, float16, from 0 on."""
    maximum: Float[np.ndarray, " examples"]
    maximum_at: Int[np.ndarray, " examples"]
    minimum: Float[np.ndarray, " examples"]
    bin_min: Float[np.ndarray, " examples"]
    bin_max: Float[np.ndarray, " examples"]
    bin_share: Float[np.ndarray, " examples"]
    """Share of the latent's firings in the bin; -1 for the strongest examples."""

    @property
    def latent(self) -> Int[np.ndarray, " examples"]:
        """The row of each example's latent."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def number(self) -> Int[np.ndarray, " examples"]:
        """The number of each example among its latent's."""
        return np.arange(len(self.group)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)


def read_examples(latents: LatentRange, text: SuiteText, path: Path) -> Examples:
    """The examples of these latents; DamagedData, which calls the file `path`, where they point outside of the text."""
    found = entries(latents.batch, "examples")
    block, position, start = (found.numbers(name).astype(np.int64) for name in ("sequence", "position", "start"))
    group = found.numbers("group").astype(np.int64)
    lengths = list_lengths(found.fields["activations"])
    values = np.asarray(found.fields["activations"].flatten().fill_null(0), np.float16)
    own = position - start
    is_inside = (block >= 0) & (block < len(text.starts) - 1) & (start >= 0) & (own >= 0) & (own < lengths)
    is_inside[is_inside] &= (start + lengths)[is_inside] <= np.diff(text.starts)[block[is_inside]]
    if not is_inside.all() or np.any((group < 0) | (group > FIFTHS)) or not np.all((values >= 0) & np.isfinite(values)):
        raise DamagedData(f"{path}: has examples outside of the text, or values that are none; describe and publish again")
    cut = np.clip(own - int(BEFORE * MAX_TOKENS), 0, np.maximum(lengths - MAX_TOKENS, 0))
    kept = np.minimum(lengths, MAX_TOKENS)
    values = values[_ranges(np.cumsum(lengths) - lengths + cut, kept)]
    tokens = text.input_ids[_ranges(text.starts[block] + start + cut, kept)]
    maximum, maximum_at, minimum = _extremes(values, kept)
    at_own = values[np.cumsum(kept) - kept + own - cut].astype(np.float64)
    bins = _bins(latents, found.counts, group, at_own, maximum)
    return Examples(found.counts, group, block, start + cut, own - cut, kept, tokens, values, maximum, maximum_at, minimum, *bins)


def _ranges(starts: Int[np.ndarray, " k"], lengths: Int[np.ndarray, " k"]) -> Int[np.ndarray, " places"]:
    """The places starts[i], starts[i] + 1, ... of all ranges, one behind the other."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _extremes(values: Float[np.ndarray, " places"], lengths: Int[np.ndarray, " k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each window its maximum, the first place that has it, and its minimum. No window is empty."""
    if not len(lengths):
        return np.zeros(0), np.zeros(0, np.int64), np.zeros(0)
    begins, wide = np.cumsum(lengths) - lengths, values.astype(np.float32)
    maximum = np.maximum.reduceat(wide, begins)
    places = np.arange(len(wide)) - np.repeat(begins, lengths)
    is_it = wide == np.repeat(maximum, lengths)
    return maximum, np.minimum.reduceat(np.where(is_it, places, len(wide)), begins), np.minimum.reduceat(wide, begins)


def _bins(
    latents: LatentRange,
    counts: Int[np.ndarray, " latents"],
    group: Int[np.ndarray, " k"],
    own: Float[np.ndarray, " k"],
    maximum: Float[np.ndarray, " k"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower end, upper end and share of firings of each example's bin."""
    row, firings = np.repeat(np.arange(len(latents)), counts), latents.values("firings").astype(np.int64)
    bounds = _bounds(latents, row, group, own)
    is_top = group == 0
    upper = np.maximum(latents.values("max_activation").astype(np.float64), bounds[:, 0])
    np.maximum.at(upper, row, maximum)
    fifth = np.maximum(group, 1)
    ranks = np.arange(FIFTHS + 1) * firings[:, None] // FIFTHS
    share = np.diff(ranks, axis=1)[row, fifth - 1] / np.maximum(firings[row], 1)
    return (
        np.where(is_top, -1.0, bounds[row, fifth]),
        np.where(is_top, _rounded_up(upper)[row], bounds[row, fifth - 1]),
        np.where(is_top, -1.0, share),
    )


def _bounds(
    latents: LatentRange, row: Int[np.ndarray, " k"], group: Int[np.ndarray, " k"], own: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "latents 6"]:
    """The values between which a latent's fifths lie, strongest first."""
    histogram, top = latents.histogram(), latents.values("max_activation").astype(np.float64)
    bins = max(histogram.shape[1], 1)
    below = np.concatenate([np.zeros((len(latents), 1)), np.cumsum(histogram, axis=1)], axis=1)
    total = below[:, -1].astype(np.int64)
    bounds = np.zeros((len(latents), FIFTHS + 1))
    for number in range(FIFTHS + 1):
        wanted = (total - number * total // FIFTHS).astype(np.float64)
        is_reached = below[:, 1:] >= wanted[:, None] if number < FIFTHS else below[:, 1:] > 0
        edge = np.where(is_reached.any(1), is_reached.argmax(1), bins - 1) if histogram.shape[1] else np.zeros(len(latents), int)
        here = np.take_along_axis(below, edge[:, None], 1)[:, 0]
        inside = np.take_along_axis(histogram, edge[:, None], 1)[:, 0] if histogram.shape[1] else np.zeros(len(latents))
        bounds[:, number] = (edge + np.clip((wanted - here) / np.maximum(inside, 1), 0, 1)) / bins * top
    highest, lowest = np.full(bounds.shape, -np.inf), np.full(bounds.shape, np.inf)
    is_fifth = group > 0
    np.maximum.at(highest, (row[is_fifth], group[is_fifth] - 1), own[is_fifth])  # of what lies below bound number group - 1
    np.minimum.at(lowest, (row[is_fifth], group[is_fifth]), own[is_fifth])  # of what lies above bound number group
    highest = np.maximum.accumulate(highest[:, ::-1], axis=1)[:, ::-1]
    lowest = np.minimum.accumulate(lowest, axis=1)
    return np.minimum.accumulate(np.minimum(np.maximum(bounds, highest), np.maximum(lowest, highest)), axis=1)


def _rounded_up(values: Shaped[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Values above 0 with 4 significant digits, never less than they were: a bin above which there is nothing."""
    size = 10.0 ** (3 - np.floor(np.log10(np.where(values > 0, values, 1.0))))
    return np.ceil(values * size - 1e-9) / size
