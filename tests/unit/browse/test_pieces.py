"""Tokens on a page: nothing invisible, nothing harmful, nothing lost."""

import html
import re

import pytest
from browser.invented_suite import HOSTILE, vocabulary

from everyscope.browse.pieces import HEAD, LONGEST, SHORT, Piece, marked, running, runs, unknown_piece

TAGS = re.compile(r'</?span(?: class="(?:ws|nl|mark|special)"| hidden| data-tip="[^"<>]*")?>|</?button[^<>]*>')


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^<>]*>", "", re.sub(r"<button.*?</button>", "", markup)))


@pytest.mark.parametrize("raw", vocabulary(is_hostile=True))
def test_only_our_own_tags_reach_the_page(raw: bytes):
    piece = Piece(7, raw, is_special=False)
    for markup in (piece.html, piece.short, running([piece, piece]), marked(raw, dots_from=2)):
        rest = TAGS.sub("", markup)
        assert not set("<>") & set(rest)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text_of(markup))


def test_what_cannot_be_seen_is_shown():
    assert [text for _, text in runs(b"a  b\n\tc", dots_from=1)] == ["a", "··", "b", "↵", "→", "c"]
    assert Piece(0, b"\x00\x1b\x7f", is_special=False).plain == "␀␛␡"
    assert Piece(0, b"\xe2\x80", is_special=False).plain == "⟨E2 80⟩"
    assert Piece(0, "\u202e\u200b".encode(), is_special=False).plain == "⟨U+202E⟩⟨U+200B⟩"
    assert Piece(0, b"", is_special=False).plain == "⟨empty⟩"
    assert unknown_piece(99).plain == "⟨token·99⟩"


def test_single_spaces_stay_spaces_in_running_text_and_are_dots_in_a_token():
    assert running([Piece(0, b"a", False), Piece(1, b" b", False)]) == "a b"
    assert text_of(Piece(1, b" b", False).html) == "·b"
    assert text_of(running([Piece(0, b":\n", False), Piece(1, b"    x", False)])) == ":↵····x"


def test_a_character_that_two_tokens_share_is_whole_in_running_text():
    halves = ["—".encode()[:2], "—".encode()[2:]]
    assert running([Piece(number, raw, False) for number, raw in enumerate(halves)]) == "—"
    assert Piece(0, halves[1], False).plain == "⟨94⟩"


def test_an_overlong_token_waits_behind_a_button_and_loses_nothing():
    raw = b"x<" * 5000
    markup = Piece(0, raw, is_special=False).html
    head, button, rest = re.fullmatch(r"(.*?)<button(.*?)</button><span hidden>(.*)</span>", markup).groups()
    assert len(html.unescape(head)) == HEAD
    assert f"{10_000 - HEAD:,} more" in button
    assert html.unescape(head + rest) == raw.decode()
    assert "<button" not in Piece(0, b"y" * LONGEST, is_special=False).html
    assert len(text_of(Piece(0, raw, is_special=False).short)) == SHORT + 1


def test_every_hostile_token_is_told_apart():
    shown = [Piece(0, raw, is_special=False).plain for raw in HOSTILE]
    assert len(set(shown)) == len(HOSTILE)
