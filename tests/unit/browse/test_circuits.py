"""The pages of graphs over HTTP: what they hold, and what damaged or missing graphs say."""

import re
from pathlib import Path

import pytest
from browser.invented_suite import Shape, write_invented_suite
from invented_graph import SCRIPT, invented_graph
from starlette.testclient import TestClient

from everyscope.browse.app import Browser
from everyscope.browse.preparation import Preparation
from everyscope.circuits.circuit_tracer import from_json
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


def test_circuit_tracers_form_is_a_download_with_labels(client):
    answer = client.get("/circuit/good/circuit-tracer.json")
    assert "attachment" in answer.headers["content-disposition"]
    graph, labels = from_json(answer.json(), "good.json")
    assert len(graph) == len(invented_graph(CODERS).pruned())
    assert labels


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
