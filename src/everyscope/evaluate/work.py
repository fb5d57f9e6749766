"""How far an evaluation is: one count for its calibration, its SAEs and its baselines, in blocks that the model reads."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from everyscope.base.progress import meter
from everyscope.evaluate.config import EvaluateConfig

UNIT = "blocks"
"""Of all counts: blocks of text times passes of the model."""


class Counter(Protocol):
    """What counts blocks: a bar, or a share of one."""

    def advance(self, amount: int, /, *, is_resumed: bool = False) -> None:
        """Count more blocks; `is_resumed` where an earlier run read them."""


class Work:
    """A share of a bar: so many blocks, of which each is counted once, and all of them at the end."""

    def __init__(self, progress: Counter, num_blocks: int) -> None:
        """`progress` counts UNIT, and expects `num_blocks` from this work."""
        self._progress, self._left = progress, num_blocks

    def advance(self, num_blocks: int, /, *, is_resumed: bool = False) -> None:
        """So many more are done; `is_resumed` where an earlier run did them."""
        counted = min(num_blocks, self._left)  # what was planned is an upper bound but for text that is read twice
        self._left -= counted
        self._progress.advance(counted, is_resumed=is_resumed)

    def finish(self) -> None:
        """Everything is done: what was planned and proved unnecessary is counted as if it had been there."""
        self.advance(self._left, is_resumed=True)


def planned_blocks(config: EvaluateConfig, groups: Sequence[int]) -> int:
    """Blocks that an evaluation of groups of so many SAEs reads, at most: the baselines' L0s are not known before."""
    found = config.calibration_blocks if config.shards is None and groups else 0
    for num_saes in groups:
        spliced = config.baseline_blocks * 5 * num_saes  # two ablations of its site and three baselines of its own
        found += config.num_sequences * (2 + num_saes) + spliced
    return found


@contextmanager
def counted(title: str, config: EvaluateConfig, groups: Sequence[int], progress: Counter | None) -> Iterator[Work]:
    """The work of one evaluation, on a bar of its own titled `title`, or as a share of what `progress` counts."""
    total = planned_blocks(config, groups)
    with ExitStack() as stack:
        work = Work(progress or stack.enter_context(meter(title, total, UNIT)), total)
        yield work
        work.finish()
