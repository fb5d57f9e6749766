"""The loops over firings, compiled by numba: one latent after another, each with scratch space that it leaves clean.

Latents are given as a range of the whole SAE's codes: `starts` [d_sae + 1], `places` and `values` [firings]. Sums over firings
run in order of place in float64, counts are integers: nothing depends on how blocks were batched.
"""

import numba
import numpy as np

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
NUM_GROUPS = 5
"""Groups of equally many firings, from the strongest to the weakest."""
EMPTY = -1
"""Stands where there is no example, token or latent."""


@compiled
def append_latents(
    starts: np.ndarray, places: np.ndarray, values: np.ndarray, filled: np.ndarray, out_places: np.ndarray, out_values: np.ndarray
) -> None:
    """Copy each latent's firings behind those that `out_places` and `out_values` hold up to `filled`, which moves on."""
    for latent in range(len(starts) - 1):
        at = filled[latent]
        for pair in range(starts[latent], starts[latent + 1]):
            out_places[at] = places[pair]
            out_values[at] = values[pair]
            at += 1
        filled[latent] = at


@compiled
def strongest_first(first: int, last: int, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The firings of each latent from the strongest to the weakest, of equals the earlier place first: [firings of the range].

    Each entry counts from its latent's first firing.
    """
    order = np.empty(starts[last] - starts[first], np.int32)
    for latent in range(first, last):
        begin, end = starts[latent], starts[latent + 1]
        order[begin - starts[first] : end - starts[first]] = np.argsort(-values[begin:end], kind="mergesort")  # stable
    return order


@compiled
def measure_activations(
    first: int,
    last: int,
    starts: np.ndarray,
    values: np.ndarray,
    order: np.ndarray,
    shares: np.ndarray,
    sums: np.ndarray,
    maxima: np.ndarray,
    histogram: np.ndarray,
    quantiles: np.ndarray,
) -> None:
    """Sum and maximum [latents], counts in equal bins from 0 to the maximum [latents, bins], and the quantiles at `shares`.

    A bin holds its lower edge, the last one both. Quantiles interpolate between neighbours, as numpy's do. `order` is as
    `strongest_first` gives it. Dead latents keep what the arrays held.
    """
    bins = histogram.shape[1]
    for latent in range(first, last):
        begin, end = starts[latent], starts[latent + 1]
        if begin == end:
            continue
        ranked = order[begin - starts[first] : end - starts[first]]
        total, largest = 0.0, np.float64(values[begin + ranked[0]])
        for pair in range(begin, end):
            value = np.float64(values[pair])
            total += value
            histogram[latent - first, min(bins - 1, int(value / largest * bins))] += 1
        sums[latent - first], maxima[latent - first] = total, largest
        for number in range(len(shares)):
            at = shares[number] * (len(ranked) - 1)
            below = int(at)
            above = min(below + 1, len(ranked) - 1)
            low, high = np.float64(values[begin + ranked[-1 - below]]), np.float64(values[begin + ranked[-1 - above]])
            quantiles[latent - first, number] = low + (high - low) * (at - below)


@compiled
def random_number_of(seed: int, latent: int, place: int) -> np.uint64:
    """A number that looks random and depends on its arguments alone (two rounds of splitmix64)."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(latent)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) + np.uint64(place)
    return x


@compiled
def choose_examples(
    first: int,
    last: int,
    starts: np.ndarray,
    places: np.ndarray,
    order: np.ndarray,
    document: np.ndarray,
    context: int,
    num_top: int,
    per_group: int,
    per_document: int,
    seed: int,
    chosen: np.ndarray,
) -> None:
    """Places of examples into `chosen` [latents, num_top + NUM_GROUPS * per_group], EMPTY where there are no more.

    First the strongest, at most one from a block and `per_document` from a document; then for each fifth of the firings by
    strength, at most one from a block, those whose `random_number_of` number is least: a fair sample of the fifth's blocks.
    `order` is as `strongest_first` gives it.
    """
    chosen[:] = EMPTY
    hashes = np.empty(per_group, np.uint64)
    for latent in range(first, last):
        begin, end = starts[latent], starts[latent + 1]
        row = chosen[latent - first]
        ranked = order[begin - starts[first] : end - starts[first]]
        take_strongest(places[begin:end], ranked, document, context, per_document, row[:num_top])
        for group in range(NUM_GROUPS):
            low, high = group * len(ranked) // NUM_GROUPS, (group + 1) * len(ranked) // NUM_GROUPS
            kept = row[num_top + group * per_group : num_top + (group + 1) * per_group]
            for rank in range(low, high):
                place = int(places[begin + ranked[rank]])
                keep_least(kept, hashes, place, random_number_of(seed, latent, place), context)


@compiled
def take_strongest(
    places: np.ndarray, order: np.ndarray, document: np.ndarray, context: int, per_document: int, kept: np.ndarray
) -> None:
    """Fill `kept` with places in `order`, but no second one of a block and no more than `per_document` of a document."""
    count = 0
    for index in order:
        if count == len(kept):
            return
        place, beside, is_taken = places[index], 0, False
        for other in kept[:count]:
            is_taken |= other // context == place // context
            beside += document[other] == document[place]
        if not is_taken and beside < per_document:
            kept[count] = place
            count += 1


@compiled
def keep_least(kept: np.ndarray, hashes: np.ndarray, place: int, number: np.uint64, context: int) -> None:
    """Put `place` among the kept ones, which ascend by number, if it is of the least; of one block only the least is kept."""
    count = 0
    while count < len(kept) and kept[count] != EMPTY:
        count += 1
    for at in range(count):
        if kept[at] // context == place // context:
            if hashes[at] <= number:
                return
            for later in range(at, count - 1):
                kept[later], hashes[later] = kept[later + 1], hashes[later + 1]
            count -= 1
            kept[count] = EMPTY
            break
    at = count
    while at > 0 and hashes[at - 1] > number:
        at -= 1
    if at == len(kept):
        return
    for later in range(min(count, len(kept) - 1), at, -1):
        kept[later], hashes[later] = kept[later - 1], hashes[later - 1]
    kept[at], hashes[at] = place, number


@compiled
def fill_windows(
    latents: np.ndarray,
    window_starts: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    places: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
) -> None:
    """The activations of `latents[i]` on the window from place `window_starts[i]` into out[offsets[i] : offsets[i + 1]]."""
    for example in range(len(latents)):
        begin, end = starts[latents[example]], starts[latents[example] + 1]
        start, length = window_starts[example], offsets[example + 1] - offsets[example]
        pair = begin + np.searchsorted(places[begin:end], start)
        while pair < end and places[pair] < start + length:
            out[offsets[example] + places[pair] - start] = values[pair]
            pair += 1


@compiled
def measure_positions(
    first: int, last: int, starts: np.ndarray, places: np.ndarray, stretch: np.ndarray, counts: np.ndarray
) -> None:
    """Count firings by stretch of positions, into [latents, stretches]; `stretch` by place."""
    for latent in range(first, last):
        for pair in range(starts[latent], starts[latent + 1]):
            counts[latent - first, stretch[places[pair]]] += 1
