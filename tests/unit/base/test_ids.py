"""Laws of base.ids: identities depend on content alone."""

from everyscope.base.ids import content_id, unit_interval


def test_content_id_ignores_the_order_of_keys_and_nothing_else():
    assert content_id({"a": 1, "b": [1, 2]}) == content_id({"b": [1, 2], "a": 1})
    assert content_id({"a": 1, "b": [1, 2]}) != content_id({"a": 1, "b": [2, 1]})
    assert len(content_id(None)) == 16


def test_content_id_is_the_same_on_every_machine():
    assert content_id({"site": "resid_post", "layer": 3}) == "b7cb8022c4c1c733"  # sha256sum of {"layer":3,"site":"resid_post"}


def test_unit_interval_is_even_and_below_one():
    numbers = sorted(unit_interval(f"document {index}") for index in range(2000))
    assert numbers[0] >= 0
    assert numbers[-1] < 1
    gap = max(abs(number - index / 2000) for index, number in enumerate(numbers))
    assert gap < 1.95 / 2000**0.5  # Kolmogorov-Smirnov at the 0.1 % level


def test_unit_interval_is_below_one_for_the_largest_hash(monkeypatch):
    class AllOnes:
        def digest(self):
            return b"\xff" * 32

    monkeypatch.setattr("hashlib.sha256", lambda data: AllOnes())
    assert unit_interval("any") < 1


def test_unit_interval_takes_any_text():
    assert unit_interval("\ud800") != unit_interval("")
