import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from everyscope.describe.explanations.syntax import KIND, KINDS, scan

SOURCE = b'''"""What it does."""
import os.path as path  # a comment
from a import b

@cached
class Store(dict):
    """Inside docs."""

    def put(self, key, value=None):
        self.items[key] = "text" + str(12)
        return call(deep=True, other=[1, 2]).method()
'''


def kinds_of(data: bytes, is_cut: bool = False) -> dict[str, list[str]]:
    """The distinct texts of each kind, in order."""
    read = scan(data, is_cut)
    starts = [0, *(np.flatnonzero(np.diff(read.kinds)) + 1).tolist(), len(data)]
    found: dict[str, list[str]] = {}
    for start, stop in pairwise(starts):
        found.setdefault(KINDS[read.kinds[start]], []).append(data[start:stop].decode())
    return found


def test_every_kind_is_recognised():
    found = kinds_of(SOURCE)
    assert found["docstring"] == ['"""What it does."""', '"""Inside docs."""']
    assert found["comment"] == ["# a comment"]
    assert found["imported name"] == ["os", "path", "path", "a", "b"]
    assert found["decorator"] == ["cached"]
    assert found["name of a class being defined"] == ["Store"]
    assert found["name of a function being defined"] == ["put"]
    assert found["parameter of a function being defined"] == ["self", "key", "value"]
    assert found["attribute"] == ["items"]
    assert found["method being called"] == ["method"]
    assert found["function being called"] == ["str", "call"]
    assert found["keyword argument"] == ["deep", "other"]
    assert found["string"] == ['"text"']
    assert found["number"] == ["12", "1", "2"]
    assert {"class", "def", "return", "import", "from", "as"} <= set(found["keyword"])


def test_statements_and_depths():
    read = scan(SOURCE, False)
    place = SOURCE.index(b"deep")
    assert read.statements[place] == "return"
    assert read.depths[place] == 1
    assert read.depths[SOURCE.index(b"1, 2")] == 2
    assert read.statements[SOURCE.index(b"items")] == ""


@pytest.mark.parametrize("mark", ["What it does", "Inside docs"])
def test_a_cut_docstring_is_still_one(mark: str):
    data = SOURCE[SOURCE.index(mark.encode()) + 3 :]
    whole = scan(SOURCE, False).kinds[-len(data) :]
    assert np.array_equal(scan(data, True).kinds, whole)


def test_prose_without_an_end_is_no_code():
    prose = b"which is written by people who know what they want and say it in words that follow one another"
    assert set(scan(prose, True).kinds) == {KIND["docstring"]}


def test_cut_code_is_read_as_the_whole_is():
    """Where a cut falls between lines of code, nothing is lost but the brackets that were open."""
    data = SOURCE[SOURCE.index(b"        self.items") :]
    indent = 8  # blanks that may be a line's beginning or its middle
    assert np.array_equal(scan(data, True).kinds[indent:], scan(SOURCE, False).kinds[-len(data) + indent :])


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_can_be_read(seed: int):
    random = np.random.default_rng(seed)
    data = bytes(random.choice(list(b"\"'#\\\n \t()[]{}:=.,@defclass0x\x00\x80\xff\xe2"), 300).tolist())
    for is_cut in (False, True):
        read = scan(data, is_cut)
        assert len(read.kinds) == len(read.depths) == len(read.statements) == len(data)
        assert 0 <= read.kinds.min() <= read.kinds.max() < len(KINDS)


def test_nearly_all_bytes_are_what_they_are_in_the_whole_file():
    """Cut at random places; what differs is mostly the rest of a comment or of a string at the cut."""
    random, same, total = np.random.default_rng(0), 0, 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[ab]*.py")):
        data = path.read_bytes()
        whole = scan(data, False).kinds
        for start in random.integers(0, max(len(data) - 800, 1), 3).tolist():
            same += int((scan(data[start : start + 800], True).kinds == whole[start : start + 800]).sum())
            total += len(data[start : start + 800])
    assert total > 20_000
    assert same / total > 0.96
