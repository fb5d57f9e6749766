"""What is measured of a range of latents from their codes: sums, shapes, examples, tokens and company."""

from dataclasses import dataclass

import numpy as np
import pyarrow
from jaxtyping import Float, Int, Int8, Int32, Int64

from everyscope.describe import columns
from everyscope.describe.codes import LatentCodes
from everyscope.describe.config import DescribeConfig
from everyscope.describe.kernels import (
    EMPTY,
    NUM_GROUPS,
    choose_examples,
    fill_windows,
    measure_activations,
    measure_positions,
    strongest_first,
)
from everyscope.describe.sequences import NO_HALF, Sequences
from everyscope.describe.token_kernels import latents_by_place, measure_cofiring, measure_tokens

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Shares of a latent's firings that are weaker than each kept quantile [1]."""
HISTOGRAM_BINS = 30
POSITION_STRETCHES = 16
TOP_TOKENS = 10
TOP_COFIRING = 8
HALF_LARGEST, HALF_SMALLEST = 65504.0, 2.0**-24
"""What float16 can hold: a firing must stay finite and must not become 0."""


@dataclass(frozen=True, eq=False)
class TextFacts:
    """What measuring asks of the text, by place; made once for all SAEs."""

    sequences: Sequences
    token: Int[np.ndarray, " places"]
    document: Int[np.ndarray, " places"]
    half: Int8[np.ndarray, " places"]
    """Half of the documents, 0 or 1, or NO_HALF."""
    occurrences: Int64[np.ndarray, "2 vocab"]
    """Tokens that count, by half and id."""
    stretch: Int[np.ndarray, " places"]
    """Stretch of positions in the block."""
    stretch_tokens: Int64[np.ndarray, " stretches"]
    """Tokens that count in each stretch."""
    window_first: Int64[np.ndarray, " places"]
    window_last: Int64[np.ndarray, " places"]
    """What a window around each place may show, ends excluded."""


def text_facts(sequences: Sequences, vocab_size: int, seed: int) -> TextFacts:
    """The facts of all blocks. `vocab_size` bounds the token ids."""
    token, mask = sequences.input_ids.ravel(), sequences.mask.ravel()
    half = sequences.halves(seed)
    stretch = np.arange(token.size) % sequences.context * POSITION_STRETCHES // sequences.context
    first, last = sequences.bounds()
    return TextFacts(
        sequences=sequences,
        token=token,
        document=sequences.document.ravel(),
        half=half,
        occurrences=np.stack([np.bincount(token[half == number], minlength=vocab_size) for number in (0, 1)]),
        stretch=stretch,
        stretch_tokens=np.bincount(stretch[mask & (half != NO_HALF)], minlength=POSITION_STRETCHES),
        window_first=first,
        window_last=last,
    )


class Measures:
    """The measurements of one SAE, a range of latents at a time."""

    def __init__(self, config: DescribeConfig, codes: LatentCodes, facts: TextFacts) -> None:
        """`codes` of the whole SAE over all blocks."""
        self._config, self._codes, self._facts = config, codes, facts
        self._begins, self._by_place = latents_by_place(codes.starts, codes.places, len(facts.token))

    def columns(self, first: int, last: int) -> dict[str, pyarrow.Array]:
        """The measured columns of latents `first` to `last` - 1."""
        firings = self._codes.firings[first:last]
        order = strongest_first(first, last, self._codes.starts, self._codes.values)
        return {
            "latent": pyarrow.array(np.arange(first, last), pyarrow.int32()),
            "firings": pyarrow.array(firings, pyarrow.int64()),
            "frequency": pyarrow.array((firings / self._facts.sequences.num_tokens).astype(np.float32)),
            **self._activations(first, last, order),
            "examples": self._examples(first, last, order),
            "cofiring": self._cofiring(first, last),
            "position_profile": self._positions(first, last),
            **self._tokens(first, last),
        }

    def _activations(self, first: int, last: int, order: Int32[np.ndarray, " firings"]) -> dict[str, pyarrow.Array]:
        count, codes = last - first, self._codes
        sums, maxima = np.zeros(count), np.zeros(count)
        histogram, quantiles = np.zeros((count, HISTOGRAM_BINS), np.int64), np.zeros((count, len(QUANTILES)))
        measure_activations(
            first, last, codes.starts, codes.values, order, np.array(QUANTILES), sums, maxima, histogram, quantiles
        )  # fmt: skip
        firings = codes.firings[first:last]
        is_alive = firings > 0
        return {
            "mean_activation": columns.numbers("mean_activation", (sums / np.maximum(firings, 1)).astype(np.float32), is_alive),
            "max_activation": columns.numbers("max_activation", maxima.astype(np.float32), is_alive),
            "histogram": columns.lists("histogram", histogram, is_alive),
            "quantiles": columns.lists("quantiles", columns.rounded(quantiles), is_alive),
        }

    def _examples(self, first: int, last: int, order: Int32[np.ndarray, " firings"]) -> pyarrow.Array:
        config, codes, facts = self._config, self._codes, self._facts
        context = facts.sequences.context
        chosen = np.empty((last - first, config.top_examples + NUM_GROUPS * config.group_examples), np.int64)
        choose_examples(
            first, last, codes.starts, codes.places, order, facts.document, context,
            config.top_examples, config.group_examples, config.examples_per_document, config.seed, chosen,
        )  # fmt: skip
        latent, column = np.nonzero(chosen != EMPTY)
        place = chosen[latent, column]
        behind_top = column - config.top_examples
        group = np.where(behind_top < 0, 0, behind_top // max(1, config.group_examples) + 1)
        start = np.maximum(place - config.window_before, facts.window_first[place])
        stop = np.minimum(place + config.window_after + 1, facts.window_last[place])
        offsets = np.concatenate([[0], np.cumsum(stop - start)])
        activations = np.zeros(offsets[-1], np.float32)
        fill_windows(latent + first, start, offsets, codes.starts, codes.places, codes.values, activations)
        halves = np.where(activations > 0, np.clip(activations, HALF_SMALLEST, HALF_LARGEST), 0).astype(np.float16)
        fields = {
            "sequence": place // context,
            "position": place % context,
            "group": group.astype(np.int8),
            "start": start % context,
            "activations": pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(halves)),
        }
        return columns.structs("examples", np.bincount(latent, minlength=last - first), fields)

    def _cofiring(self, first: int, last: int) -> pyarrow.Array:
        shape, codes = (last - first, TOP_COFIRING), self._codes
        latents, counts, phi = np.empty(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
        num_tokens = self._facts.sequences.num_tokens
        measure_cofiring(
            first, last, codes.starts, codes.places, self._begins, self._by_place, num_tokens, latents, counts, phi
        )  # fmt: skip
        return columns.ranked("cofiring", latents, count=counts, phi=columns.rounded(phi))

    def _positions(self, first: int, last: int) -> pyarrow.Array:
        codes, tokens = self._codes, self._facts.stretch_tokens
        counts = np.zeros((last - first, POSITION_STRETCHES), np.int64)
        measure_positions(first, last, codes.starts, codes.places, self._facts.stretch, counts)
        shares = np.where(tokens > 0, counts / np.maximum(tokens, 1), np.nan)
        return columns.lists("position_profile", columns.rounded(shares), codes.firings[first:last] > 0)

    def _tokens(self, first: int, last: int) -> dict[str, pyarrow.Array]:
        shape, codes, facts = (last - first, TOP_TOKENS), self._codes, self._facts
        tokens, counts = np.full(shape, EMPTY, np.int64), np.zeros(shape, np.int64)
        entropy, predictability = np.full(last - first, np.nan), np.full(last - first, np.nan)
        measure_tokens(
            first, last, codes.starts, codes.places, facts.token, facts.half, facts.occurrences,
            tokens, counts, entropy, predictability,
        )  # fmt: skip
        share = counts / np.maximum(facts.occurrences.sum(0)[tokens], 1)
        is_alive = codes.firings[first:last] > 0
        return {
            "tokens": columns.ranked("tokens", tokens, count=counts, share=columns.rounded(share)),
            "token_entropy": columns.numbers("token_entropy", columns.rounded(entropy), is_alive),
            "token_predictability": columns.numbers("token_predictability", columns.rounded(predictability), is_alive),
        }


def group_words(config: DescribeConfig) -> list[str]:
    """What each number in the examples' `group` means."""
    fifths = [f"{name} fifth of firings" for name in ("strongest", "second", "middle", "fourth", "weakest")]
    return [f"strongest, at most one a block and {config.examples_per_document} a document", *fifths]


def histogram_edges() -> Float[np.ndarray, " edges"]:
    """Edges of the histogram's bins, as shares of the maximum."""
    return np.linspace(0, 1, HISTOGRAM_BINS + 1)
