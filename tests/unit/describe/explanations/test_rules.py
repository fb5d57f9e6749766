"""Planted latents: what fires on a token set, an n-gram or a class of syntax is named and found again, and noise is not."""

import re
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from everyscope.describe.explanations.firings import Firings
from everyscope.describe.explanations.offline import Ground, learn_labels, score_labels
from everyscope.describe.explanations.passages import LEARN
from everyscope.describe.explanations.rules import VALUE_PRICE, OneOf, Rule, least_share, price_of

PLANTED = {
    "token": ("token", "`:`"),
    "token set": ("token", "`,` or `.`|`.` or `,`"),
    "n-gram": ("context", "`.` after `␣self`"),
    "docstring": ("syntax", "docstring"),
    "parameter": ("syntax", "parameter of a function being defined"),
    "import": ("syntax", "in a line that begins with `from`"),
    "both": ("mixed", "`(` in a line that begins with `def`"),
}
"""What is planted: its kind, and what its label says; where two rules are equal on any text, either."""


TOKENS = r"`[^`]+` (<1|\d+) %(, `[^`]+` (<1|\d+) %)*"
"""What heads a latent without a rule: tokens with the shares of their occurrences on which it fires."""


def planted_where(ground: Ground, what: str) -> np.ndarray:
    """Where the planted latent fires; bool [tokens]."""
    families, pieces = ground.traits.families, ground.traits.pieces
    ids = ground.passages.input_ids.ravel()
    text = np.array([piece.decode("utf-8", "replace") for piece in pieces], object)[ids]
    kinds = np.array(families["kind"].keys, object)[families["kind"].values]
    statements = np.array(families["statement"].keys, object)[families["statement"].values]
    before = np.roll(text, 1)
    return {
        "token": text == ":",
        "token set": np.isin(text, [",", "."]),
        "n-gram": (text == ".") & (before == " self"),
        "docstring": kinds == "docstring",
        "parameter": kinds == "parameter of a function being defined",
        "import": statements == "from",
        "both": (text == "(") & (statements == "def"),
    }[what]


def test_planted_latents_get_their_labels_and_score_one_and_noise_does_not(ground: Ground, plant: Callable[..., Firings]):
    size = ground.passages.input_ids.size
    noise = np.random.default_rng(1).random((8, size)) < 0.01
    firings = plant(*(planted_where(ground, what) for what in PLANTED), *noise)
    labels = learn_labels(ground, firings, lambda _: None)
    found = {one.latent: one for one in score_labels(ground, firings, labels)}
    assert len(found) == len(PLANTED) + len(noise)
    for latent, (what, (kind, words)) in enumerate(PLANTED.items()):
        mine = found[latent]
        assert mine.detection is not None, what
        assert mine.fuzzing is not None, what
        assert any(word in mine.label for word in words.split("|")), what
        assert mine.kind in kind.split("|"), mine.label
        assert mine.detection.value > 0.97, mine.label
        assert mine.fuzzing.value > 0.97, mine.label
        assert mine.detection_null is not None
        assert mine.detection.low > mine.detection_null
    for latent in range(len(PLANTED), len(found)):
        other = found[latent]
        assert other.detection is not None
        assert other.kind == "none"
        assert re.fullmatch(TOKENS, other.label), other.label
        assert other.detection.low < 0.6
    nulls = [one.detection_null for one in found.values() if one.detection_null is not None]
    assert abs(np.mean(nulls) - 0.5) < 0.1


def test_an_n_gram_is_named(ground: Ground, plant: Callable[..., Firings]):
    """The most frequent pair of tokens whose second token also stands elsewhere."""
    pairs = ground.traits.families["pair"]
    learnt = pairs.values[ground.passages.tokens_of(LEARN)]
    texts = [tuple(ground.traits.pieces[one] for one in key if one >= 0) for key in pairs.keys]  # pyright: ignore[reportGeneralTypeIssues]
    wanted = max((n for n, text in enumerate(texts) if text == (b"self", b".")), key=lambda n: int((learnt == n).sum()))
    label = learn_labels(ground, plant(pairs.values == wanted), lambda _: None)[0]
    assert label.label == "`.` after `self`"
    assert label.kind == "context"


def test_the_set_is_the_best_of_all_sets(ground: Ground):
    """Against every subset of the commonest tokens, by brute force, at the search's own gain."""
    values = ground.traits.families["token"].values
    learn = ground.passages.tokens_of(LEARN)
    common = np.argsort(-np.bincount(values[learn]))[:7]
    random = np.random.default_rng(3)
    chance = dict(zip(common.tolist(), random.uniform(0, 1, 7).tolist(), strict=True))
    fires = np.array([random.random() < chance.get(value, 0.0) for value in values[learn].tolist()])
    cost = min(ground.config.window_tokens, (~fires).sum() / fires.sum())

    def gain(chosen: tuple[int, ...]) -> float:
        passed = np.isin(values[learn], chosen)
        gained = (passed & fires).sum() / fires.sum() - cost * (passed & ~fires).sum() / (~fires).sum()
        return gained - VALUE_PRICE * (len(chosen) - 1)

    sets = [one for size in range(1, 6) for one in combinations(common.tolist(), size)]
    found = ground.search.best_set(learn[fires], np.ones(int(fires.sum())), "token")
    assert found is not None
    assert gain(found.values) >= max(map(gain, sets)) - 1e-9


def test_a_rule_is_worth_its_detection_on_the_learning_windows(ground: Ground):
    """Against a count window by window; and no single set of any family is worth more than what is found."""
    learn = ground.passages.tokens_of(LEARN)
    kinds = ground.traits.families["kind"]
    fires = (kinds.values[learn] == kinds.keys.index("docstring")) & (np.random.default_rng(4).random(len(learn)) < 0.2)
    found = ground.search.best(learn[fires], np.ones(int(fires.sum())))
    assert found is not None

    def worth(rule: Rule) -> float:
        passed, fired = rule.holds(ground.traits, np.arange(ground.passages.input_ids.size)), np.zeros(kinds.values.size, bool)
        fired[learn[fires]] = True
        each = [(passed[at].any(), fired[at].any()) for at in map(ground.learn.tokens, range(len(ground.learn)))]
        hits, false_alarms = ([said for said, is_so in each if is_so == wanted] for wanted in (True, False))
        return float(np.mean(hits) - np.mean(false_alarms)) - price_of(rule)

    assert found.gain == pytest.approx(worth(found.rule))
    every = [ground.search.best_set(learn[fires], np.ones(int(fires.sum())), name) for name in ground.traits.families]
    assert found.gain >= max(worth(Rule(((test,),))) for test in every if test) - 1e-9


def test_a_rule_reads_nothing_but_text(ground: Ground):
    """The same text elsewhere gives the same answers: tokens of equal traits pass or fail together."""
    families = ground.traits.families
    rule = Rule(((OneOf("token", (5, 9)), OneOf("previous", (3, 4))), (OneOf("kind", (7,)),)))
    every = np.arange(ground.passages.input_ids.size)
    passed = rule.holds(ground.traits, every)
    want = np.isin(families["token"].values, (5, 9)) & np.isin(families["previous"].values, (3, 4))
    assert np.array_equal(passed, want | (families["kind"].values == 7))
    some = every[::7][::-1]
    assert np.array_equal(rule.holds(ground.traits, some), passed[some])


def test_too_few_firings_are_called_rare(ground: Ground, plant: Callable[..., Firings]):
    fires = np.zeros(ground.passages.input_ids.size, bool)
    fires[ground.passages.tokens_of(LEARN)[:3]] = True
    labels = learn_labels(ground, plant(fires), lambda _: None)
    assert labels[0].kind == "rare"
    assert re.fullmatch(r"rare: 3 of [\d,]+ tokens, `.+`", labels[0].label)
    assert score_labels(ground, plant(fires), labels)[0].detection is None


def test_a_latent_that_fires_on_nothing_twice_has_no_rule(ground: Ground, plant: Callable[..., Firings]):
    """So few firings at chance that no value is worth a rule: the label names tokens and says that they are no rule."""
    learn = ground.passages.tokens_of(LEARN)
    values = ground.traits.families["token"].values[learn]
    commonest = learn[values == np.bincount(values).argmax()][:200:20]
    others = learn[np.unique(values, return_index=True)[1]][:5]
    for tokens in (others, np.concatenate([others, commonest])):
        fires = np.zeros(ground.passages.input_ids.size, bool)
        fires[tokens] = True
        label = learn_labels(ground, plant(fires), lambda _: None)[0]
        assert label.kind == "none"
        assert re.fullmatch(TOKENS, label.label), label.label


def test_a_latent_without_a_rule_is_headed_by_the_tokens_it_owns(ground: Ground, plant: Callable[..., Firings]):
    """Not by the commonest: of two tokens the one on all of whose occurrences it fires comes first, of rare ones none."""
    learn = ground.passages.tokens_of(LEARN)
    values = ground.traits.families["token"].values[learn]
    counts = np.bincount(values)
    common, owned = int(counts.argmax()), int(np.flatnonzero(counts == 8)[0])
    fires = np.zeros(ground.passages.input_ids.size, bool)
    fires[learn[values == common][: counts[common] // 3]] = True
    fires[learn[values == owned]] = True
    fires[learn[np.flatnonzero(values == np.flatnonzero(counts == 1)[0])]] = True
    rule, shares = ground.search.distinctive(learn[fires[learn]])
    assert rule.alternatives[0][0].values == (owned, common)
    assert shares.tolist() == pytest.approx([1.0, counts[common] // 3 / counts[common]])
    many, few = least_share(np.array([90, 9, 1]), np.array([100, 10, 1])), least_share(np.array([0]), np.array([5]))
    assert (np.diff(many) < 0).all()
    assert few[0] == pytest.approx(0.0, abs=1e-12)


def test_held_out_firings_change_no_label(ground: Ground, plant: Callable[..., Firings]):
    """Leak test: labels are the same whatever happens on held-out documents."""
    fires = planted_where(ground, "parameter")
    spoiled = fires.copy()
    held_out = ground.passages.tokens_of(2)
    spoiled[held_out] = np.random.default_rng(0).random(len(held_out)) < 0.3
    clean, other = (learn_labels(ground, plant(one), lambda _: None)[0] for one in (fires, spoiled))
    assert clean.label == other.label
    assert clean.rule == other.rule
