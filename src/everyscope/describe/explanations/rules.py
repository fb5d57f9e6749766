"""Rules that say from text alone where a latent fires, and the search for the best short one.

A rule is a set of values of a family, two such sets that must both hold, or either of two such. The search maximises

    gain(rule) = recall - cost * false alarms / silent tokens

which is twice the balanced accuracy, less one, where cost = 1. Judged by windows of L tokens, a false alarm spoils L tokens, so a
common rule on a rare latent scores badly there; hence cost = min(L, silent / firing), at which no rule pays that is right less
often than it is wrong. Recall and false alarms of a set are sums over its values, so the best set of k values of a family is
that of the k largest gains: nothing is approximated but the pairs of families, which are built greedily.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from everyscope.describe.explanations.counting import Counters
from everyscope.describe.explanations.traits import Traits

MIN_VALUE_FIRINGS = 2
"""Firings on a value below which it enters no set: one may be chance [tokens]."""
VALUE_PRICE, TEST_PRICE, EITHER_PRICE = 0.01, 0.03, 0.06
"""What each further value, a further set that must hold, and an alternative must gain to be worth a longer label [1]."""
STARTS = 3
"""Families from which pairs are built."""
COMMONEST = 3
"""Tokens named where no rule was found [tokens]."""
RELAXED = 10.0
"""How much cheaper false alarms are in a pair's first set: the second one removes them [1]."""


@dataclass(frozen=True)
class OneOf:
    """A token passes where its value of `family` is one of `values`."""

    family: str
    values: tuple[int, ...]
    """Best first."""


@dataclass(frozen=True)
class Rule:
    """A token passes where all tests of one alternative hold."""

    alternatives: tuple[tuple[OneOf, ...], ...]

    def holds(self, traits: Traits, tokens: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the tokens pass. Reads nothing but text."""
        families = {test.family: traits.families[test.family] for tests in self.alternatives for test in tests}
        values = {name: family.values[tokens] for name, family in families.items()}
        return passing(self, values, {name: len(family.keys) for name, family in families.items()})


@dataclass(frozen=True)
class Found:
    """A rule with its gain on the tokens it was learnt on, prices taken off [1]."""

    rule: Rule
    gain: float


@dataclass(frozen=True)
class _Scope:
    """Some of the learning tokens, and the values that the firings among them have: all that a search for a set needs."""

    firing: Int[np.ndarray, " n"]
    """Places of the firings among the learning tokens."""
    weights: Float[np.ndarray, " n"]
    """Share of recall that each of them is worth [1]."""
    values: Int[np.ndarray, " values"]
    """Every value of theirs, numbered over all families, so in order of family."""
    counts: Int[np.ndarray, " values"]
    """Firings on each value [tokens]."""
    recall: Float[np.ndarray, " values"]
    """Summed weight of those firings [1]."""
    totals: Int[np.ndarray, " values"]
    """Tokens of the scope with each value, firing or not [tokens]."""


class RuleSearch:
    """The search over one set of learning tokens; made once for all latents."""

    def __init__(self, traits: Traits, tokens: Int[np.ndarray, " n"], window_tokens: int) -> None:
        """`tokens` are in order; `window_tokens` bounds the cost of a false alarm [tokens]."""
        self._tokens, self._window = tokens, window_tokens
        self._families = traits.families
        families = list(traits.families.values())
        self._names = [family.name for family in families]
        self._sizes = [family.max_values for family in families]
        self._offsets = np.cumsum([0, *(len(family.keys) for family in families)])
        columns = [family.values[tokens] + offset for family, offset in zip(families, self._offsets, strict=False)]
        self._values = np.stack(columns, axis=1).astype(np.int32)
        self._counters = Counters(self._values, int(self._offsets[-1]))
        self._totals = np.bincount(self._values.ravel(), minlength=self._offsets[-1])

    def best(self, firing: Int[np.ndarray, " n"], activations: Float[np.ndarray, " n"]) -> Found | None:
        """The best rule for a latent that fires on the tokens `firing`, all of them learning tokens, so strongly; None where
        no set of any family is right more often than it costs.

        Half of recall counts firings, half activation: what a latent does strongly names it, what it does often predicts it.
        """
        weights = 0.5 / len(firing) + 0.5 * activations / activations.sum()
        num_silent = max(len(self._tokens) - len(firing), 1)
        cost = min(self._window, num_silent / len(firing)) / num_silent
        places = np.searchsorted(self._tokens, firing)
        values, counts, recall = self._counters.count(places, weights)
        whole = _Scope(places, weights, values, counts, recall, self._totals[values])
        found = [Found(Rule(((test,),)), gain) for test, gain in self._sets(whole, cost)]
        found += self._pairs(whole, cost)
        return self._either(max(found, key=lambda one: one.gain), whole, cost) if found else None

    def most_common(self, firing: Int[np.ndarray, " n"]) -> Rule:
        """The tokens on which a latent fires most often, whatever else it does."""
        column = self._names.index("token")
        values, counts = np.unique(self._values[np.searchsorted(self._tokens, firing), column], return_counts=True)
        return Rule(((self._test(column, values[np.argsort(-counts, kind="stable")[:COMMONEST]]),),))

    def _test(self, family: int, values: Int[np.ndarray, " n"]) -> OneOf:
        return OneOf(self._names[family], tuple((values - self._offsets[family]).tolist()))

    def _sets(self, scope: _Scope, cost: float) -> list[tuple[OneOf, float]]:
        """The best set of each family within a scope, and its gain less the price of its values; none where nothing gains."""
        gains = np.where(scope.counts >= MIN_VALUE_FIRINGS, scope.recall - cost * (scope.totals - scope.counts), -1.0)
        worth = np.flatnonzero(gains > 0)
        order = worth[np.argsort(-gains[worth], kind="stable")]
        family_of = np.searchsorted(self._offsets, scope.values[order], side="right") - 1
        found = []
        for family, size in enumerate(self._sizes):
            chosen = order[family_of == family][:size]
            chosen = chosen[: 1 + int((gains[chosen[1:]] > VALUE_PRICE).sum())]
            if len(chosen):
                gain = float(gains[chosen].sum()) - VALUE_PRICE * (len(chosen) - 1)
                found.append((self._test(family, scope.values[chosen]), gain))
        return found

    def _pairs(self, whole: _Scope, cost: float) -> list[Found]:
        """Pairs of sets: one that is too wide by itself, and the best second one within it."""
        wide = sorted(self._sets(whole, cost / RELAXED), key=lambda one: -one[1])[:STARTS]
        found = []
        for first, _ in wide:
            scope = self._within(Rule(((first,),)), whole)
            for second, gain in self._sets(scope, cost):
                if second.family != first.family:
                    price = TEST_PRICE + VALUE_PRICE * (len(first.values) - 1)
                    found.append(Found(Rule(((first, second),)), gain - price))
        return found

    def _either(self, best: Found, whole: _Scope, cost: float) -> Found:
        """`best`, or it and the best set outside of it, where that pays."""
        passed = self._passed(best.rule)
        left = ~passed[whole.firing]
        firing, weights = whole.firing[left], whole.weights[left]
        values, counts, recall = self._counters.count(firing, weights)
        totals = self._totals[values] - self._counters.totals(np.flatnonzero(passed), values)
        others = self._sets(_Scope(firing, weights, values, counts, recall, totals), cost)
        test, gain = max(others, key=lambda one: one[1], default=(best.rule.alternatives[0][0], 0.0))
        if gain <= EITHER_PRICE:
            return best
        return Found(Rule((*best.rule.alternatives, (test,))), best.gain + gain - EITHER_PRICE)

    def _within(self, rule: Rule, whole: _Scope) -> _Scope:
        """The learning tokens that pass a rule."""
        passed = self._passed(rule)
        kept = passed[whole.firing]
        firing, weights = whole.firing[kept], whole.weights[kept]
        values, counts, recall = self._counters.count(firing, weights)
        return _Scope(firing, weights, values, counts, recall, self._counters.totals(np.flatnonzero(passed), values))

    def _passed(self, rule: Rule) -> Bool[np.ndarray, " n"]:
        """Which learning tokens pass."""
        numbers = {test.family: self._names.index(test.family) for tests in rule.alternatives for test in tests}
        values = {name: self._values[:, number] - self._offsets[number] for name, number in numbers.items()}
        return passing(rule, values, {name: len(self._families[name].keys) for name in numbers})


def passing(rule: Rule, values: Mapping[str, Int[np.ndarray, " n"]], sizes: Mapping[str, int]) -> Bool[np.ndarray, " n"]:
    """Which of n tokens pass, given their values by family and the number of values of each family."""
    assert rule.alternatives, "a rule without alternatives says nothing of any token"
    return np.logical_or.reduce(
        [
            np.logical_and.reduce([_is_one_of(test.values, sizes[test.family])[values[test.family]] for test in tests])
            for tests in rule.alternatives
        ]
    )


def _is_one_of(chosen: tuple[int, ...], num_values: int) -> Bool[np.ndarray, " values"]:
    """For each value of a family whether it is in a set."""
    table = np.zeros(num_values, bool)
    table[list(chosen)] = True
    return table
