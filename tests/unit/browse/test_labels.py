"""Labels on pages: chips for tokens, one set of signs for whitespace, nothing harmful, a word for quality."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
from browser.asking import ask
from browser.invented_suite import Shape, write_invented_suite

from everyscope.browse.app import Browser
from everyscope.browse.labels import QUALITIES, dot, label_html, label_plain, quality_of
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index
from everyscope.browse.views.examples import example_groups

CHIP = re.compile(r'<code class="chip">(.*?)</code>')


def shown(markup: str) -> str:
    return html.unescape(re.sub(r"<[^<>]*>", "", markup))


@pytest.mark.parametrize(
    ("label", "chips", "plain"),
    [
        ("any token after `.⏎␣×7`, `␣def`", [".↵·······", "·def"], "any token after “.↵·······”, “·def”"),
        ("`␣×40` or `⇥`", ["·×40", "→"], "“·×40” or “→”"),
        ("no token at all", [], "no token at all"),
        ("`<b>` & <i>", ["<b>"], "“<b>” & <i>"),
        ("one `without end", ["without end"], "one “without end”"),
        ("", [], ""),
        (None, [], ""),
    ],
)
def test_quoted_tokens_are_chips(label: str | None, chips: list[str], plain: str):
    markup = label_html(label)
    assert [shown(chip) for chip in CHIP.findall(markup)] == chips
    assert label_plain(label) == plain
    assert set(re.findall(r"<(\w+)", markup)) <= {"code", "span"}
    assert "␣" not in markup + label_plain(label)


def test_quality_is_a_word_at_every_value():
    assert [quality_of(least) for _, least in QUALITIES[:2]] == ["strong", "weak"]
    assert quality_of(QUALITIES[1][1] - 1e-9) == quality_of(-1.0) == "poor"
    assert quality_of(None) == ""
    for item, word in (
        ({"label": "a", "quality": 0.4}, "strong label"),
        ({"label": None, "quality": None}, "no label"),
        ({"label": "a"}, "without a score"),
    ):
        assert word in dot(item)


def test_what_is_no_label_is_no_title(index: Index, get: Any):
    sae = index.saes[-1]
    for latent in (3, 4):  # one in seven has no rule
        page = get(f"/sae/{sae.folder}/{latent}").text
        title = shown(re.findall(r"<h1.*?</h1>", page)[0])
        assert (title == f"Latent {latent}") == (latent == 3), title
        assert ("No rule found" in page) == (latent == 3)
    caption = index.captions([(sae, 3), (sae, 4)])
    assert caption[sae.number, 3]["label"] is None
    assert caption[sae.number, 4]["label"] == index.explanations(sae, 4)[0]["label"]


def test_repeated_examples_are_left_out_and_counted(index: Index):
    sae = index.saes[-1]
    details = index.details(sae, 5)
    assert details is not None
    groups, num_repeated = example_groups(index, details)
    again = {**details, "examples": [*details["examples"], *details["examples"]]}
    same, num_more = example_groups(index, again)
    assert same == groups
    assert num_more == num_repeated + len(details["examples"])
    for group in groups:
        peaks = [example.peak for example in group["examples"]]
        assert peaks == sorted(peaks, reverse=True)


def test_a_dead_latent_leads_to_its_nearest_living_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shape = Shape(kinds=("resid_post",), layers=1, widths=(60,), l0s=(5.0,), num_sequences=8, context=32)
    preparation = Preparation(write_invented_suite(tmp_path / "suite", shape), tmp_path / "cache")
    index = preparation.run()
    (sae,) = index.saes
    near = [{"relation": 0, "sae": 0, "latent": latent, "cosine": cosine} for latent, cosine in ((39, 0.9), (7, 0.8), (8, 0.7))]
    whole = Index.details
    monkeypatch.setattr(Index, "details", lambda *given: {**(whole(*given) or {}), "neighbours": near})
    page = shown(ask(Browser(preparation, None).app(), f"/sae/{sae.folder}/19").text)
    assert re.search(r"nearest living twin.*7 0\.80", re.sub(r"\s+", " ", page))
    assert index.living(sae, [39, 7, 8]) == {7, 8}
