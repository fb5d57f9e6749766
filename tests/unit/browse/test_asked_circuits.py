"""Graphs and interventions that pages ask for: what reaches the model, what does not, and where graphs are kept."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from browser.asking import Answer, FakeLive, ask
from browser.invented_suite import Shape, write_invented_suite
from invented_graph import invented_graph

from everyscope.browse.app import Browser
from everyscope.browse.live import Ablation, AblationRequest, CircuitRequest
from everyscope.browse.preparation import Preparation
from everyscope.browse.views.asked_circuit import ablation_json
from everyscope.circuits.circuit_tracer import node_id
from everyscope.circuits.config import Contrast, Latent, TargetTokens
from everyscope.circuits.files import ENDING, FOLDER, graphs_in
from everyscope.circuits.graph import LATENT
from everyscope.circuits.writing import write_graph

SHAPE = Shape(kinds=("transcoder",), layers=2, widths=(64,), l0s=(5.2,), context=32)
CODERS = [(f"transcoder/layer_{layer}/width_64/average_l0_5", 64) for layer in range(2)]
GRAPH = invented_graph(CODERS)
BY_INFLUENCE = sorted((GRAPH.kind == LATENT).nonzero()[0].tolist(), key=lambda node: -GRAPH.influence[node])
LATENTS = [node_id(GRAPH, node) for node in BY_INFLUENCE]
FOREIGN = {"sec-fetch-site": "cross-site"}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = write_invented_suite(tmp_path / "suite", SHAPE)
    write_graph(folder / FOLDER / f"good{ENDING}", GRAPH)
    return folder


@pytest.fixture
def live() -> FakeLive:
    return FakeLive()


@pytest.fixture
def post(suite: Path, tmp_path: Path, live: FakeLive) -> Callable[..., Answer]:
    preparation = Preparation(suite, tmp_path / "cache")
    preparation.run()
    app = Browser(preparation, lambda: live).app()
    return lambda address, form=None, **more: ask(app, address, form=None if form is None else form.encode(), **more)


def test_a_graph_is_drawn_once_and_then_found(post, suite, live):
    answer = post("/circuit/new", "prompt=def+f(x):&position=3")
    assert answer.status == 303
    (name,) = graphs_in(suite).keys() - {"good"}
    assert answer.headers["location"] == f"/circuit/{name}"
    assert post(answer.headers["location"]).status == 200
    assert f"/circuit/{name}" in post("/circuits").text
    assert post("/circuit/new", "prompt=def+f(x):&position=3").headers["location"] == f"/circuit/{name}"
    assert live.drawn == [CircuitRequest("def f(x):", 3)]
    os.utime(graphs_in(suite)[name], (0, 0))  # older than the suite: of other transcoders, perhaps
    post("/circuit/new", "prompt=def+f(x):&position=3")
    assert len(live.drawn) == 2


@pytest.mark.parametrize(
    ("fields", "target"),
    [
        ("", None),
        ("&target=+value", TargetTokens((" value",))),
        ("&target=+value&against=+name", Contrast(" value", " name")),
        ("&latent=1.2.33", Latent(1, 2, 33)),
    ],
)
def test_what_is_explained(post, live, fields, target):
    assert post("/circuit/new", f"prompt=a{fields}").status == 303
    assert live.drawn[0] == CircuitRequest("a", None, target)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("prompt=+", "give 1 to 4,000"),
        ("prompt=" + "a" * 4001, "4,001 characters"),
        ("prompt=a&position=-1", "the number of a token"),
        ("prompt=a&position=" + "9" * 5000, "the number of a token"),
        ("prompt=a&against=b", "give the token, too"),
        ("prompt=a&latent=1.2", "layer.position.latent"),
        ("prompt=a&latent=1.2.%C2%B2", "layer.position.latent"),
        ("prompt=a&latent=1.2.3&target=b", "leave one field empty"),
    ],
)
def test_odd_requests_draw_nothing(post, live, form, words):
    answer = post("/circuit/new", form)
    assert answer.status == 422
    assert words in answer.text
    assert not live.drawn


def test_the_form_computes_nothing_and_begins_only_for_our_own_pages(post, live):
    address = "/circuit/new?prompt=def+f&position=2"
    own, typed, foreign = (post(address, headers=headers) for headers in ({"sec-fetch-site": "same-origin"}, {}, FOREIGN))
    assert own.status == typed.status == foreign.status == 200
    assert ["data-begins" in answer.text for answer in (own, typed, foreign)] == [True, False, False]
    assert 'value="2"' in own.text
    assert "def f</textarea>" in own.text
    assert not live.drawn


@pytest.mark.parametrize("address", ["/circuit/new", "/circuit/good/ablate"])
def test_another_sites_page_makes_no_model_work(post, live, address):
    assert post(address, f"prompt=a&variant={LATENTS[0]}", headers=FOREIGN).status == 403
    assert not live.drawn
    assert not live.ablated


def test_a_suite_that_cannot_be_written_has_its_graphs_beside_the_index(suite, tmp_path, monkeypatch):
    preparation = Preparation(suite, tmp_path / "cache")
    assert preparation.new_graphs == suite / FOLDER
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(suite)))
    assert preparation.new_graphs.is_relative_to(tmp_path / "cache")
    write_graph(preparation.new_graphs / f"new{ENDING}", GRAPH)
    assert set(preparation.graphs) == {"good", "new"}


def test_ablation_is_measured_beside_predicted(post, live):
    form = f"variant={LATENTS[0]},{LATENTS[5]}&variant={LATENTS[7]}&factor=0.5&attention=yes"
    answer = post("/circuit/good/ablate", form, headers={"accept": "application/json"})
    assert answer.status == 200
    both, one = json.loads(answer.text)
    assert both["targets"] == [[-2.0, -1.0]] * 2
    assert both["tokens"][0] == ["<b>value</b>", 0.75, 0.5]
    assert [row[0] for row in both["latents"]] == [LATENTS[12], LATENTS[-1]]  # an edited latent is no downstream one
    assert [row[0] for row in one["latents"]] == [LATENTS[0], LATENTS[12], LATENTS[-1]]
    (asked,) = live.ablated
    assert (asked.factor, asked.freezes_attention, asked.freezes_norms) == (0.5, True, False)
    layer, index, position = map(int, LATENTS[7].split("_"))
    assert asked.variants[1] == (Latent(layer, position, index),)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("", "0 variants"),
        ("variant=", "no latent of this graph"),
        ("variant=E_3_0", "no latent of this graph"),
        ("&".join(["variant=a"] * 41), "pin fewer"),
        (f"variant={LATENTS[0]}&factor=nan", "expected a number"),
        (f"variant={LATENTS[0]}&factor=1e9", "expected a number"),
    ],
)
def test_odd_ablations_are_one_line(post, live, form, words):
    answer = post("/circuit/good/ablate", form, headers={"accept": "application/json"})
    assert answer.status == 422
    assert answer.headers["content-type"] == "application/json"
    assert words in answer.text
    assert not live.ablated


def test_what_overflows_is_no_number_and_no_fault():
    nan = float("nan")
    answer = Ablation(((nan, -1.0),), ((b"a", 0.5, nan),), ((BY_INFLUENCE[0], nan, 0.0),))
    (found,) = ablation_json(GRAPH, AblationRequest(((),)), [answer])
    assert found == {"targets": [[None, -1.0]], "tokens": [["a", 0.5, None]], "latents": [[LATENTS[0], None, 0.0]]}
