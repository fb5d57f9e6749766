"""Which windows a label is judged on: the same for rules and for language models, so that their scores can be compared.

Active windows come evenly from the deciles of a latent's peak activation, weak ones too. Silent windows are silent: the exact
activations were looked at. Half of them are ones in which the latents that most often fire beside it do fire.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from everyscope.describe.explanations.firings import Firings, window_peaks
from everyscope.describe.explanations.passages import Windows

NUM_DECILES = 10
NUM_NEIGHBOURS = 5
"""Co-firing latents whose windows make hard negatives [latents]."""
NEIGHBOUR_WINDOWS = 4096
"""Windows in which co-firing is counted at most; bounds memory and time [windows]."""
CHUNK_LATENTS = 2048
"""Latents whose co-firing with as many others is counted at once; bounds memory [latents]."""


@dataclass(frozen=True)
class Sample:
    """The windows on which a latent's label is judged."""

    active: Int[np.ndarray, " n"]
    """Windows in which it fires."""
    silent: Int[np.ndarray, " m"]
    """Windows in which it does not."""
    right: tuple[Int[np.ndarray, " marks"], ...]
    """For each active window that allows it, the tokens on which it fires."""
    wrong: tuple[Int[np.ndarray, " marks"], ...]
    """For the same windows, as many tokens (at most all) on which it does not."""
    marked: Int[np.ndarray, " k"]
    """Those windows."""

    @property
    def windows(self) -> Int[np.ndarray, " n_plus_m"]:
        """All windows that detection is asked about, the active ones first."""
        return np.concatenate([self.active, self.silent])


def draw_sample(
    firings: Firings,
    windows: Windows,
    latent: int,
    neighbours_fire: Bool[np.ndarray, " windows"],
    num_active: int,
    num_silent: int,
    seed: int,
) -> Sample:
    """At most so many windows of each kind, drawn by seed and latent alone."""
    random = np.random.default_rng([seed, latent])
    window, peaks = window_peaks(firings, windows, latent)
    active = window[stratified(peaks, num_active, random)]
    is_silent = np.ones(len(windows), bool)
    is_silent[window] = False
    hard = _drawn(np.flatnonzero(is_silent & neighbours_fire), num_silent // 2, random)
    is_silent[hard] = False
    silent = np.concatenate([hard, _drawn(np.flatnonzero(is_silent), num_silent - len(hard), random)])
    right, wrong, marked = [], [], []
    tokens, _ = firings.of(latent)
    first, last = np.searchsorted(tokens, (windows.start[active], windows.start[active] + windows.length[active]))
    for number, start, stop in zip(active.tolist(), first.tolist(), last.tolist(), strict=True):
        fires = tokens[start:stop]
        quiet = np.delete(windows.tokens(number), fires - windows.start[number])
        if len(quiet):
            right.append(fires)
            wrong.append(_drawn(quiet, len(fires), random))
            marked.append(number)
    return Sample(active, silent, tuple(right), tuple(wrong), np.array(marked, np.int64))


def stratified(peaks: Float[np.ndarray, " n"], count: int, random: np.random.Generator) -> Int[np.ndarray, " k"]:
    """Places of at most `count` of the peaks, evenly from their deciles, strongest first."""
    order = np.argsort(-peaks, kind="stable")
    deciles = np.array_split(order, NUM_DECILES)
    quotas = [len(part) for part in np.array_split(np.arange(min(count, len(peaks))), NUM_DECILES)]
    chosen = [_drawn(decile, quota, random) for decile, quota in zip(deciles, quotas, strict=True)]
    kept = np.concatenate(chosen) if chosen else order[:0]
    return kept[np.argsort(-peaks[kept], kind="stable")]


def _drawn(candidates: Int[np.ndarray, " n"], count: int, random: np.random.Generator) -> Int[np.ndarray, " k"]:
    return np.sort(random.choice(candidates, min(count, len(candidates)), replace=False))


def neighbours_of(firings: Firings, windows: Windows, latents: Sequence[int]) -> Int[np.ndarray, "latents neighbours"]:
    """For each of some latents the others that most often fire in the same windows, by cosine of their activity."""
    active = _activity(firings, windows)
    norms = np.sqrt(np.maximum(active.sum(1), 1)).astype(np.float32)
    count = min(NUM_NEIGHBOURS, firings.d_sae - 1)
    best, score = np.zeros((len(latents), count), np.int64), np.full((len(latents), count), -1.0, np.float32)
    for mine in range(0, len(latents), CHUNK_LATENTS):
        rows = np.asarray(latents[mine : mine + CHUNK_LATENTS])
        place = slice(mine, mine + len(rows))
        for start in range(0, firings.d_sae, CHUNK_LATENTS):
            others = np.arange(start, min(start + CHUNK_LATENTS, firings.d_sae))
            cosines = active[rows].astype(np.float32) @ active[others].T.astype(np.float32) / norms[rows, None] / norms[others]
            cosines[rows[:, None] == others] = -2.0
            known = np.concatenate([best[place], np.broadcast_to(others, cosines.shape)], axis=1)
            cosines = np.concatenate([score[place], cosines], axis=1)
            top = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
            best[place], score[place] = np.take_along_axis(known, top, 1), np.take_along_axis(cosines, top, 1)
    return best


def _activity(firings: Firings, windows: Windows) -> Bool[np.ndarray, "d_sae windows"]:
    """Which latent fires in which of some windows, evenly spread over all."""
    step = max(1, -(-len(windows) // NEIGHBOUR_WINDOWS))
    latents = np.repeat(np.arange(firings.d_sae), firings.num_tokens())
    window = windows.of_token[firings.tokens]
    kept = (window >= 0) & (window % step == 0)
    activity = np.zeros((firings.d_sae, -(-len(windows) // step)), bool)
    activity[latents[kept], window[kept] // step] = True
    return activity
