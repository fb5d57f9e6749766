"""Rules that say from text alone where a latent fires, and the search for the best short one.

A rule is a set of values of a family, two such sets that must both hold, or either of two such. It is worth what it scores in
detection over the windows of the learning half, less the price of its words:

    worth(rule) = windows that pass / windows in which the latent fires - silent windows that pass / silent windows - price

which is twice the balanced accuracy, less one. Rules to be judged are proposed by tokens, where sums over values are all that is
needed:

    gain(set) = recall - cost * false alarms / silent tokens

Judged by windows of L tokens, a false alarm spoils L tokens at most; hence cost = min(L, silent / firing), at which no rule pays
that is right less often than it is wrong, and shares of that, for false alarms that crowd into few windows. The best set of k
values of a family is that of the k largest gains; pairs of families and alternatives are built greedily.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from everyscope.describe.explanations.counting import ValueCounters, choose_sets
from everyscope.describe.explanations.passages import Windows
from everyscope.describe.explanations.traits import Traits

MIN_VALUE_FIRINGS = 2
"""Firings on a value below which it enters no set: one may be chance [tokens]."""
VALUE_PRICE, TEST_PRICE, EITHER_PRICE = 0.01, 0.03, 0.06
"""What each further value, a further set that must hold, and an alternative must gain to be worth a longer label [1]."""
STARTS = 5
"""Families from which pairs are built."""
COSTS = (1.0, 0.3, 0.1)
"""Shares of a false alarm's cost at which sets are sought: the cheaper, the wider."""
TRIED, EXTENDED, ALTERNATIVES = 24, 3, 3
"""Rules of the largest promise that are judged by windows; of these, how many are widened by an alternative, and by how many."""
DISTINCTIVE = 3
"""Tokens named where no rule was found [tokens]."""
OFTEN = 3
"""Firings on a token that is named there, if any has so many [tokens]."""
SURE = 2.0
"""Standard deviations below a measured share at which the true one is taken to be."""
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
class FoundRule:
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


@dataclass(frozen=True)
class _Sets:
    """The best set of each family within a scope, and what it does there."""

    family: Int[np.ndarray, " sets"]
    values: Int[np.ndarray, "sets most"]
    """Numbered over all families, best first; of each row the first `size` are its set."""
    size: Int[np.ndarray, " sets"]
    recall: Float[np.ndarray, " sets"]
    """Summed weight of the firings that pass [1]."""
    false_alarms: Int[np.ndarray, " sets"]
    """Silent tokens that pass [tokens]."""

    @property
    def price(self) -> Float[np.ndarray, " sets"]:
        """What further values must gain [1]."""
        return VALUE_PRICE * (self.size - 1)

    def best(self, cost: float, count: int) -> Int[np.ndarray, " k"]:
        """The sets of largest gain, prices taken off."""
        return np.argsort(self.price + cost * self.false_alarms - self.recall, kind="stable")[:count]

    def promise(self, silent: int, length: int) -> Float[np.ndarray, " sets"]:
        """About what each is worth by windows of `length` tokens: a false alarm spoils a window once."""
        return self.recall - 1 + (1 - np.minimum(self.false_alarms / silent, 1.0)) ** length - self.price


@dataclass(frozen=True)
class _Postings:
    """For each value of a family the places at which it stands."""

    order: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " values_plus_1"]

    @classmethod
    def of(cls, column: Int[np.ndarray, " n"], num_values: int) -> "_Postings":
        order = np.argsort(column, kind="stable").astype(np.int32)
        return cls(order, np.concatenate([[0], np.cumsum(np.bincount(column, minlength=num_values))]))

    @property
    def num_values(self) -> int:
        return len(self.starts) - 1

    def count(self, values: tuple[int, ...]) -> int:
        """At how many places one of the values stands."""
        return int(sum(self.starts[value + 1] - self.starts[value] for value in values))

    def places(self, values: tuple[int, ...]) -> Int[np.ndarray, " k"]:
        """These places, value by value."""
        return np.concatenate([self.order[self.starts[value] : self.starts[value + 1]] for value in values])


class RuleSearch:
    """The search over one set of learning tokens; made once for all latents."""

    def __init__(self, traits: Traits, tokens: Int[np.ndarray, " n"], windows: Windows, window_tokens: int) -> None:
        """`tokens` are in order, `windows` cut from them; `window_tokens` is the length of those that are whole [tokens]."""
        self._tokens, self._length = tokens, window_tokens
        families = list(traits.families.values())
        self._names = [family.name for family in families]
        self._sizes = np.array([family.max_values for family in families])
        self._offsets = np.cumsum([0, *(len(family.keys) for family in families)])
        self._columns = [family.values[tokens] for family in families]
        numbered = [column + offset for column, offset in zip(self._columns, self._offsets, strict=False)]
        self._values = np.stack(numbered, axis=1).astype(np.int32)
        self._counters = ValueCounters(self._values, int(self._offsets[-1]))
        self._places = [_Postings.of(column, len(family.keys)) for column, family in zip(self._columns, families, strict=True)]
        self._totals = np.bincount(self._values.ravel(), minlength=self._offsets[-1])
        self._window, self._num_windows = windows.of_token[tokens], len(windows)

    def best(self, firing: Int[np.ndarray, " n"], activations: Float[np.ndarray, " n"]) -> FoundRule | None:
        """The best rule for a latent that fires on the tokens `firing`, all of them learning tokens, so strongly; None where
        no set of any family is right more often than it costs.

        Half of recall counts firings, half activation: what a latent does strongly names it, what it does often predicts it.
        """
        whole, cost = self._whole(firing, activations)
        rules = self._promising(whole, cost)
        if not rules:
            return None
        judge = _Judge(self, whole)
        ranked = sorted((judge.found(rule) for rule in rules), key=lambda one: -one.gain)
        wider = [judge.found(rule) for one in ranked[:EXTENDED] for rule in self._either(one.rule, whole, cost)]
        best = max([ranked[0], *wider], key=lambda one: one.gain)
        return best if best.gain > 0 else None

    def best_set(self, firing: Int[np.ndarray, " n"], activations: Float[np.ndarray, " n"], family: str) -> OneOf | None:
        """The set of values of one family with the largest gain by tokens, prices taken off."""
        whole, cost = self._whole(firing, activations)
        sets = self._sets(whole, cost)
        numbers = np.flatnonzero(sets.family == self._names.index(family))
        return self._test(sets, int(numbers[0])) if len(numbers) else None

    def distinctive(self, firing: Int[np.ndarray, " n"]) -> tuple[Rule, Float[np.ndarray, " k"]]:
        """The tokens of whose occurrences a latent fires on the largest shares, surely, and these shares [1]."""
        column = self._names.index("token")
        values, counts = np.unique(self._values[np.searchsorted(self._tokens, firing), column], return_counts=True)
        totals = self._totals[values]
        often = counts >= min(OFTEN, counts.max())
        order = np.argsort(np.where(often, -least_share(counts, totals), 1.0), kind="stable")[
            : min(DISTINCTIVE, int(often.sum()))
        ]
        test = OneOf("token", tuple((values[order] - self._offsets[column]).tolist()))
        return Rule(((test,),)), counts[order] / totals[order]

    def _whole(self, firing: np.ndarray, activations: np.ndarray) -> tuple[_Scope, float]:
        """All learning tokens, and what a false alarm costs there."""
        weights = 0.5 / len(firing) + 0.5 * activations / activations.sum()
        num_silent = max(len(self._tokens) - len(firing), 1)
        cost = min(self._length, num_silent / len(firing)) / num_silent
        places = np.searchsorted(self._tokens, firing)
        values, counts, recall = self._counters.count(places, weights)
        return _Scope(places, weights, values, counts, recall, self._totals[values]), cost

    def _test(self, sets: _Sets, number: int) -> OneOf:
        family = int(sets.family[number])
        return OneOf(self._names[family], tuple((sets.values[number, : sets.size[number]] - self._offsets[family]).tolist()))

    def _sets(self, scope: _Scope, cost: float) -> _Sets:
        """The best set of each family within a scope at a cost; none where nothing gains."""
        found = choose_sets(
            scope.values,
            scope.counts,
            scope.recall,
            scope.totals,
            cost,
            MIN_VALUE_FIRINGS,
            self._offsets,
            self._sizes,
            VALUE_PRICE,
        )
        return _Sets(*found)

    def _promising(self, whole: _Scope, cost: float) -> list[Rule]:
        """Sets and pairs of sets, of which one is too wide by itself and the other the best one within it, by their promise."""
        silent = max(len(self._tokens) - len(whole.firing), 1)
        batches: list[tuple[_Sets, OneOf | None, np.ndarray]] = []
        for share in COSTS:
            sets = self._sets(whole, cost * share)
            batches.append((sets, None, sets.promise(silent, self._length)))
        wide = self._sets(whole, cost / RELAXED)
        for number in wide.best(cost / RELAXED, STARTS).tolist():
            first = self._test(wide, number)
            scope = self._within(Rule(((first,),)), whole)
            for share in COSTS[:2]:
                sets = self._sets(scope, cost * share)
                promise = sets.promise(silent, self._length) - TEST_PRICE - wide.price[number]
                batches.append((sets, first, np.where(sets.family == wide.family[number], -1.0, promise)))
        promises = np.concatenate([promise for _, _, promise in batches])
        owner = np.repeat(np.arange(len(batches)), [len(promise) for _, _, promise in batches])
        begins = np.searchsorted(owner, np.arange(len(batches)))
        rules: dict[Rule, None] = {}
        for place in np.argsort(-promises, kind="stable").tolist():
            if promises[place] <= 0 or len(rules) == TRIED:
                break
            sets, first, _ = batches[owner[place]]
            test = self._test(sets, int(place - begins[owner[place]]))
            rules[Rule((((first, test) if first else (test,)),))] = None
        return list(rules)

    def _either(self, rule: Rule, whole: _Scope, cost: float) -> Iterator[Rule]:
        """A rule, or one of the best sets outside of it."""
        passing = self.places_of(rule)
        left = ~self._marked(passing)[whole.firing]
        firing, weights = whole.firing[left], whole.weights[left]
        values, counts, recall = self._counters.count(firing, weights)
        totals = self._totals[values] - self._counters.totals(passing, values)
        scope = _Scope(firing, weights, values, counts, recall, totals)
        for share in COSTS[:2]:
            others = self._sets(scope, cost * share)
            for number in others.best(cost * share, ALTERNATIVES).tolist():
                yield Rule((*rule.alternatives, (self._test(others, number),)))

    def _within(self, rule: Rule, whole: _Scope) -> _Scope:
        """The learning tokens that pass a rule."""
        passing = self.places_of(rule)
        kept = self._marked(passing)[whole.firing]
        firing, weights = whole.firing[kept], whole.weights[kept]
        values, counts, recall = self._counters.count(firing, weights)
        return _Scope(firing, weights, values, counts, recall, self._counters.totals(passing, values))

    def places_of(self, rule: Rule) -> Int[np.ndarray, " k"]:
        """Places, among the learning tokens, of those that pass, in no order; each once if the rule has one alternative.

        What a mask over all tokens would say, at the cost of the tokens that pass: rules are narrow and the text is long.
        """
        return np.concatenate([self._places_of_all(tests) for tests in rule.alternatives])

    def _places_of_all(self, tests: tuple[OneOf, ...]) -> Int[np.ndarray, " k"]:
        """Where all of some tests hold: where the narrowest does, and the others with it."""
        numbers = [self._names.index(test.family) for test in tests]
        sizes = [self._places[number].count(test.values) for number, test in zip(numbers, tests, strict=True)]
        first = int(np.argmin(sizes))
        found = self._places[numbers[first]].places(tests[first].values)
        for which, (number, test) in enumerate(zip(numbers, tests, strict=True)):
            if which != first:
                found = found[_is_one_of(test.values, self._places[number].num_values)[self._columns[number][found]]]
        return found

    def _marked(self, places: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " n"]:
        """A mask over the learning tokens."""
        marked = np.zeros(len(self._tokens), bool)
        marked[places] = True
        return marked

    def windows_of(self, tokens: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " windows"]:
        """The windows in which some of the learning tokens, given by their places, lie."""
        found = np.zeros(self._num_windows + 1, bool)  # the last, for tokens in no window
        found[self._window[tokens]] = True
        return found[:-1]


class _Judge:
    """What rules are worth for one latent: detection over the windows of the learning half, less the price of their words."""

    def __init__(self, search: RuleSearch, whole: _Scope) -> None:
        self._search, self._active = search, search.windows_of(whole.firing)
        self._num_active, self._num_silent = int(self._active.sum()), int((~self._active).sum())

    def found(self, rule: Rule) -> FoundRule:
        """The rule with its worth."""
        answers = self._search.windows_of(self._search.places_of(rule))
        hits = int((answers & self._active).sum())
        false_alarms = int(answers.sum()) - hits
        worth = hits / max(self._num_active, 1) - false_alarms / max(self._num_silent, 1)
        return FoundRule(rule, worth - price_of(rule))


def least_share(counts: Int[np.ndarray, " n"], totals: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Wilson's lower bound of each share: one of one says less than nine of ten."""
    share, spread = counts / totals, SURE**2 / totals
    return (share + spread / 2 - SURE * np.sqrt(share * (1 - share) / totals + spread / totals / 4)) / (1 + spread)


def price_of(rule: Rule) -> float:
    """What the words of a rule must gain for it [1]."""
    tests = [test for tests in rule.alternatives for test in tests]
    values = VALUE_PRICE * sum(len(test.values) - 1 for test in tests)
    return values + TEST_PRICE * (len(tests) - len(rule.alternatives)) + EITHER_PRICE * (len(rule.alternatives) - 1)


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
