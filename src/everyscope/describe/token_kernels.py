"""The loops that ask how much the current token says about a latent, and which latents fire together, compiled by numba."""

import numpy as np

from everyscope.describe.kernels import EMPTY, compiled


@compiled
def measure_tokens(
    first: int,
    last: int,
    starts: np.ndarray,
    places: np.ndarray,
    token: np.ndarray,
    half: np.ndarray,
    occurrences: np.ndarray,
    top_tokens: np.ndarray,
    top_counts: np.ndarray,
    entropy: np.ndarray,
    predictability: np.ndarray,
) -> None:
    """For each latent the tokens it fires on most, the entropy of its tokens [nats], and how well they predict it.

    `token` and `half` (0 or 1) are by place, `occurrences` [2, vocab] counts all tokens of each half. What dead latents have
    is left as it was; so is the predictability of those that one half of the documents does not show, or shows everywhere.
    """
    counts = np.zeros(occurrences.shape, np.int64)
    totals = occurrences.sum(axis=1)
    for latent in range(first, last):
        begin, end = starts[latent], starts[latent + 1]
        if begin == end:
            continue
        seen = np.empty(min(end - begin, occurrences.shape[1]), np.int64)
        fired, num_seen = np.zeros(2, np.int64), 0
        for pair in range(begin, end):
            place = places[pair]
            if counts[0, token[place]] + counts[1, token[place]] == 0:
                seen[num_seen] = token[place]
                num_seen += 1
            counts[half[place], token[place]] += 1
            fired[half[place]] += 1
        seen = seen[:num_seen]
        take_most_frequent(seen, counts, top_tokens[latent - first], top_counts[latent - first])
        total = 0.0
        for number in seen:
            share = (counts[0, number] + counts[1, number]) / (end - begin)
            total -= share * np.log(share)
        entropy[latent - first] = max(total, 0.0)
        if 0 < fired[0] < totals[0] and 0 < fired[1] < totals[1]:
            both = [rule_accuracy(seen, counts, occurrences, fired, totals, learn) for learn in (0, 1)]
            predictability[latent - first] = (both[0] + both[1]) / 2
        for number in seen:
            counts[0, number], counts[1, number] = 0, 0


@compiled
def take_most_frequent(seen: np.ndarray, counts: np.ndarray, tokens: np.ndarray, frequencies: np.ndarray) -> None:
    """The most frequent of `seen`, most frequent first and of equals the smaller id, into `tokens` and `frequencies`."""
    filled = 0
    for number in seen:
        count, at = counts[0, number] + counts[1, number], filled
        while at > 0 and (frequencies[at - 1] < count or (frequencies[at - 1] == count and tokens[at - 1] > number)):
            at -= 1
        if at == len(tokens):
            continue
        filled = min(filled + 1, len(tokens))
        for later in range(filled - 1, at, -1):
            tokens[later], frequencies[later] = tokens[later - 1], frequencies[later - 1]
        tokens[at], frequencies[at] = number, count


@compiled
def rule_accuracy(
    seen: np.ndarray, counts: np.ndarray, occurrences: np.ndarray, fired: np.ndarray, totals: np.ndarray, learn: int
) -> float:
    """Balanced accuracy on one half of the best rule "fires exactly on the tokens in S" of the other half, `learn` [1].

    The best S for balanced accuracy holds the tokens that are likelier where the latent fires than where it does not.
    """
    test = 1 - learn
    hits, false_alarms = 0, 0
    for number in seen:
        silent = occurrences[learn, number] - counts[learn, number]
        if counts[learn, number] * (totals[learn] - fired[learn]) > silent * fired[learn]:
            hits += counts[test, number]
            false_alarms += occurrences[test, number] - counts[test, number]
    return (hits / fired[test] + 1 - false_alarms / (totals[test] - fired[test])) / 2


@compiled
def latents_by_place(starts: np.ndarray, places: np.ndarray, num_places: int) -> tuple[np.ndarray, np.ndarray]:
    """The same firings the other way round: where each place's latents begin [num_places + 1], and the latents [firings]."""
    begins = np.zeros(num_places + 1, np.int64)
    for place in places:
        begins[place + 1] += 1
    begins = np.cumsum(begins)
    filled, latents = begins.copy(), np.empty(len(places), np.int32)
    for latent in range(len(starts) - 1):
        for pair in range(starts[latent], starts[latent + 1]):
            latents[filled[places[pair]]] = latent
            filled[places[pair]] += 1
    return begins, latents


@compiled
def measure_cofiring(
    first: int,
    last: int,
    starts: np.ndarray,
    places: np.ndarray,
    begins: np.ndarray,
    by_place: np.ndarray,
    num_tokens: int,
    latents: np.ndarray,
    counts: np.ndarray,
    phi: np.ndarray,
) -> None:
    """For each latent those with which it fires together beyond chance, by phi coefficient, into [latents, kept].

    `begins` and `by_place` are as `latents_by_place` gives them. Of equals the smaller latent comes first; EMPTY fills the rest.
    Work grows with firings times L0, memory with neither.
    """
    latents[:] = EMPTY
    together, size = np.zeros(len(starts) - 1, np.int64), latents.shape[1]
    seen = np.empty(len(together), np.int64)
    for latent in range(first, last):
        row, num_seen = latent - first, 0
        for pair in range(starts[latent], starts[latent + 1]):
            for other in by_place[begins[places[pair]] : begins[places[pair] + 1]]:
                if together[other] == 0:
                    seen[num_seen] = other
                    num_seen += 1
                together[other] += 1
        filled, own = 0, float(starts[latent + 1] - starts[latent])
        for other in seen[:num_seen]:
            count, its = together[other], float(starts[other + 1] - starts[other])
            together[other] = 0
            spread = np.sqrt(own * (num_tokens - own)) * np.sqrt(its * (num_tokens - its))
            value = (float(num_tokens) * count - own * its) / spread if spread > 0 else 0.0
            if other == latent or value <= 0:
                continue
            at = filled
            while at > 0 and (phi[row, at - 1] < value or (phi[row, at - 1] == value and latents[row, at - 1] > other)):
                at -= 1
            if at == size:
                continue
            filled = min(filled + 1, size)
            for later in range(filled - 1, at, -1):
                latents[row, later], counts[row, later] = latents[row, later - 1], counts[row, later - 1]
                phi[row, later] = phi[row, later - 1]
            latents[row, at], counts[row, at], phi[row, at] = other, count, value
