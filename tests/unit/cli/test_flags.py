import pytest

from everyscope.cli.flags import split_flags


@pytest.mark.parametrize(
    ("words", "named", "others"),
    [
        ("--listen a:1 --harvest.num-tokens 8", "--listen a:1", "--harvest.num-tokens 8"),
        ("--harvest.dtype=float32 --buffer-bytes=7", "--buffer-bytes=7", "--harvest.dtype=float32"),
        ("--no-offer-files --seed 1 --buffer-bytes 9", "--no-offer-files --buffer-bytes 9", "--seed 1"),
        ("--text.paths a b --listen c:1", "--listen c:1", "--text.paths a b"),
        ("stray --listen a:1", "--listen a:1", "stray"),
        ("--listening a", "", "--listening a"),
        ("", "", ""),
    ],
)
def test_flags_go_with_their_values_to_whom_they_belong(words, named, others):
    got = split_flags(words.split(), {"listen", "offer_files", "buffer_bytes"})
    assert got == (named.split(), others.split())
