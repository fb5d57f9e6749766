"""Counts of what is repaired while text is read: the first case is reported at once, the number of all of them at the end."""

from functools import cache

from everyscope.base.progress import say


class Tally:
    """One kind of repair."""

    def __init__(self, what: str, remedy: str) -> None:
        """`what` names the kind in the plural, as "bytes that are not UTF-8"; `remedy` says what becomes of them."""
        self._what, self._remedy, self._first = what, remedy, ""
        self.count = 0
        """Cases so far."""

    def add(self, count: int, place: str) -> None:
        """Count cases; `place` says where they are."""
        if count and not self.count:
            self._first = place
            _say_once(f"{place}: {self._what}; {self._remedy}")
        self.count += count

    def close(self) -> None:
        """Report the number of all cases, where there were several."""
        if self.count > 1:
            _say_once(f"{self.count} {self._what} in all, the first in {self._first}; {self._remedy}")


@cache
def _say_once(message: str) -> None:
    """Several stages read the same text: each line is for people, who need it once."""
    say(message)
