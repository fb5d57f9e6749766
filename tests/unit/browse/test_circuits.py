"""The pages of graphs over HTTP: what they hold, and what damaged or missing graphs say."""

import json
import re
from pathlib import Path

import pytest
from browser.invented_suite import Shape, write_invented_suite
from invented_graph import SCRIPT, invented_graph
from starlette.testclient import TestClient

from everyscope.browse.app import Browser
from everyscope.browse.preparation import Preparation
from everyscope.circuits.circuit_tracer import from_json, node_id, to_json
from everyscope.circuits.files import ENDING, FOLDER
from everyscope.circuits.graph import LATENT
from everyscope.circuits.writing import write_graph

SHAPE = Shape(kinds=("transcoder",), layers=2, widths=(64,), l0s=(5.2,), context=32, is_hostile=True)
CODERS = [(f"transcoder/layer_{layer}/width_64/average_l0_5", 64) for layer in range(2)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_invented_suite(tmp_path_factory.mktemp("graphs") / "suite", SHAPE)
    write_graph(folder / FOLDER / f"good{ENDING}", invented_graph(CODERS))
    write_graph(folder / FOLDER / f"loose{ENDING}", invented_graph(CODERS, violation=0.02))
    write_graph(folder / FOLDER / f"foreign{ENDING}", invented_graph([("elsewhere/layer_0", 64), ("elsewhere/layer_1", 64)]))
    (folder / FOLDER / f"damaged{ENDING}").write_bytes(b"\x00" * 100)
    return folder


@pytest.fixture(scope="module")
def client(suite: Path) -> TestClient:
    preparation = Preparation(suite, suite.parent / "cache")
    preparation.run()
    return TestClient(Browser(preparation, None).app(), base_url="http://127.0.0.1", raise_server_exceptions=False)


def test_the_list_has_every_graph_and_says_which_cannot_be_read(client):
    page = client.get("/circuits")
    assert page.status_code == 200
    assert {*re.findall(r'href="/circuit/(\w+)"', page.text)} == {"good", "loose", "foreign", "new"}
    assert f"damaged{ENDING}" in page.text
    assert page.text.count("sums do not hold") == 1
    assert SCRIPT not in page.text


def test_a_page_shows_its_violation_and_a_large_one_in_red(client):
    good, loose = (client.get(f"/circuit/{name}") for name in ("good", "loose"))
    assert good.status_code == loose.status_code == 200
    assert 'role="alert"' not in good.text
    assert "breaks its own sums" in loose.text
    assert '<dd class="wrong">0.02</dd>' in loose.text
    assert SCRIPT not in good.text
    assert "\u202e" not in good.text.replace("<bdi>", "").split("</h1>")[1]


def test_data_for_the_script(client):
    data = client.get("/circuit/good.json").json()
    graph = invented_graph(CODERS)
    known = {node["id"]: node for node in data["nodes"]}
    assert len(known) == len(data["nodes"])
    latents = [node for node in data["nodes"] if node["kind"] == "latent"]
    assert 0 < len(latents) <= (graph.kind == LATENT).sum()
    assert all(node["href"] == f"/sae/{CODERS[node['layer']][0]}/{node['index']}" for node in latents)
    assert all(node["label"] is not None for node in latents)
    shares = [edge[3] for edge in data["edges"]]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    for source, target, _, _ in data["edges"]:
        assert data["nodes"][source]["layer"] < data["nodes"][target]["layer"]
    for place, node in enumerate(data["nodes"]):
        if node["kind"] in ("latent", "logit"):
            sent = sum(weight for _, target, weight, _ in data["edges"] if target == place)
            assert sent + node["rest"] + node["bias"] == pytest.approx(node["pre"], abs=1e-5)


def test_cards_say_what_a_latent_does(client):
    graph = invented_graph(CODERS)
    node = int((graph.kind == LATENT).nonzero()[0][0])
    card = client.get(f"/circuit/good/card/{graph.coder[node]}/{graph.index[node]}").json()
    assert set(card) == {"fires", "raises", "lowers", "examples"}
    assert card["raises"]
    assert any(level > 0 for example in card["examples"] for _, level in example)
    for address in ("/circuit/good/card/7/0", "/circuit/good/card/0/999", "/circuit/foreign/card/0/0"):
        assert client.get(address).status_code == 404


def test_what_is_pinned_stays_in_circuit_tracers_form_however_little_it_matters(client):
    graph = invented_graph(CODERS)
    latents = (graph.kind == LATENT).nonzero()[0]
    least = node_id(graph, int(latents[graph.influence[latents].argmin()]))
    plain = client.get("/circuit/good/circuit-tracer.json?nodes=50&edges=80").json()
    assert least not in [node["node_id"] for node in plain["nodes"]]
    query = {"nodes": 50, "edges": 80, "pins": f"{least},nothing", "group": f"one:two:{least}"}
    found = client.get("/circuit/good/circuit-tracer.json", params=query).json()
    assert least in [node["node_id"] for node in found["nodes"]]
    assert from_json(found, "").facts.pins == (least,)
    assert from_json(found, "").facts.groups == (("one:two", least),)
    for wrong in ("nodes=0", "nodes=x", "edges=101"):
        assert client.get(f"/circuit/good/circuit-tracer.json?{wrong}").status_code == 422


def test_a_page_as_one_file_asks_nobody_and_ends_no_script_early(client):
    answer = client.get("/circuit/good/page.html")
    assert "attachment" in answer.headers["content-disposition"]
    assert not re.findall(r'(?:src|href)="(?!#)', answer.text)
    assert SCRIPT not in answer.text
    data = json.loads(re.search(r'<script type="application/json" id="graph-data">(.*?)</script>', answer.text, re.DOTALL)[1])
    assert data["tokens"][1] == SCRIPT
    assert {f"{node['coder']}_{node['index']}" for node in data["nodes"] if node["kind"] == "latent"} == set(data["cards"])
    assert data["ablate"] is None


def test_an_imported_graph_opens_with_its_labels_pins_and_groups_and_claims_no_sums(client, suite):
    graph = invented_graph([("elsewhere/layer_0", 64), ("elsewhere/layer_1", 64)])
    pins = [node_id(graph, int(node)) for node in (graph.kind == LATENT).nonzero()[0][:3]]
    written = to_json(graph, "slug", {(int(graph.coder[0]), int(graph.index[0])): "<b>a label</b>"}, "scan")
    written["qParams"] |= {"pinnedIds": [*pins, "nothing"], "supernodes": [["pair", *pins[:2]], ["empty", "nothing"]]}
    write_graph(suite / FOLDER / f"imported{ENDING}", from_json(written, "graph.json"))
    data = client.get("/circuit/imported.json").json()
    assert data["pins"] == pins
    assert data["groups"] == [["pair", *pins[:2]]]
    assert next(node for node in data["nodes"] if node["id"] == pins[0])["label"] == "<b>a label</b>"
    assert data["ablate"] is None
    page = client.get("/circuit/imported").text
    assert "sums and scores cannot be checked" in page
    assert "violation" not in page


def test_circuit_tracers_form_is_a_download_with_labels(client):
    answer = client.get("/circuit/good/circuit-tracer.json")
    assert "attachment" in answer.headers["content-disposition"]
    graph = from_json(answer.json(), "good.json")
    assert len(graph) == len(invented_graph(CODERS).pruned())
    assert graph.facts.labels


def test_graphs_of_another_suite_have_no_links(client):
    data = client.get("/circuit/foreign.json").json()
    assert all(node.get("href") is None for node in data["nodes"])
    assert client.get("/circuit/foreign").status_code == 200


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("/circuit/none", 404, "suite has no graph"),
        ("/circuit/..%2F..%2Fsuite", 404, ""),
        ("/circuit/damaged", 422, "cannot be read"),
        ("/circuit/damaged.json", 422, "compute it again"),
    ],
)
def test_what_is_not_there_is_a_page_of_one_line(client, address, status, words):
    answer = client.get(address)
    assert answer.status_code == status
    assert words in answer.text
