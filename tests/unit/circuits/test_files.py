"""Graph files: the same graph comes back, and nothing that is none does; circuit-tracer's JSON against its rules."""

import json
from dataclasses import replace

import numpy as np
import pytest
from random_transcoders import transcoder

from everyscope.base.errors import DamagedData, DataError
from everyscope.circuits.attribution import attribute
from everyscope.circuits.circuit_tracer import from_json, paired, to_json, unpaired
from everyscope.circuits.files import ENDING, FOLDER, graphs_in, read_graph, slug_of
from everyscope.circuits.graph import COLUMNS, ERROR, LATENT, LOGIT, TOKEN, Graph
from everyscope.circuits.influence import Edges
from everyscope.circuits.paths import strongest_paths
from everyscope.circuits.writing import write_graph

CODERS = [transcoder(layer, 32, 48, has_skip=layer == 1) for layer in range(3)]


@pytest.fixture
def graph(gemma2, prompt) -> Graph:
    return attribute(gemma2, CODERS, prompt).pruned()


def test_a_file_gives_the_graph_back(graph, tmp_path):
    path = tmp_path / FOLDER / f"some{ENDING}"
    write_graph(path, graph)
    found = read_graph(path)
    assert found.facts == graph.facts
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(found, name), getattr(graph, name), rtol=1e-6)
    assert np.array_equal(found.edges.target, graph.edges.target)
    np.testing.assert_allclose(found.edges.weight, graph.edges.weight, rtol=1e-6)
    assert found.scores.replacement == pytest.approx(graph.scores.replacement)
    first = path.read_bytes()
    write_graph(path, found)
    assert path.read_bytes() == first
    assert graphs_in(tmp_path) == {"some": path}


def test_a_changed_byte_anywhere_is_one_line(graph, tmp_path):
    path = tmp_path / f"some{ENDING}"
    write_graph(path, graph)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedData, match="compute it again") as error:
            read_graph(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedData):
        read_graph(path)


def with_entry(graph: Graph, name: str, value: float) -> Graph:
    column = getattr(graph, name).copy()
    column[np.flatnonzero(graph.kind == LATENT)[3]] = value
    return replace(graph, **{name: column})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("kind", 9, "kinds"),
        ("kind", LOGIT, "targets"),
        ("layer", 7, "layers"),
        ("position", 10, "positions"),
        ("index", 48, "latents"),
        ("coder", 3, "coders"),
        ("coder", -1, "latents"),
        ("pre", np.nan, "finite"),
    ],
)
def test_a_sealed_file_of_nonsense_is_one_line(graph, tmp_path, name, value, words):
    path = tmp_path / f"some{ENDING}"
    write_graph(path, with_entry(graph, name, value))
    with pytest.raises(DamagedData, match=words):
        read_graph(path)


def test_a_latent_that_is_there_twice_is_refused(graph, tmp_path):
    first, second = np.flatnonzero((graph.kind == LATENT) & (graph.layer == 0))[:2]
    doubled = {name: getattr(graph, name).copy() for name in ("position", "index")}
    for column in doubled.values():
        column[second] = column[first]
    write_graph(tmp_path / "graph", replace(graph, **doubled))
    with pytest.raises(DamagedData, match="twice"):
        read_graph(tmp_path / "graph")


def test_edges_that_lead_down_or_nowhere_are_refused(graph, tmp_path):
    path = tmp_path / f"some{ENDING}"
    turned = Edges(graph.edges.target, graph.edges.source, graph.edges.weight)
    write_graph(path, replace(graph, edges=turned))
    with pytest.raises(DamagedData, match="upwards"):
        read_graph(path)
    beyond = Edges(graph.edges.source, graph.edges.target + len(graph), graph.edges.weight)
    write_graph(path, replace(graph, edges=beyond))
    with pytest.raises(DamagedData, match="nowhere"):
        read_graph(path)


def test_slugs_are_names_of_files():
    assert slug_of("def read(self):\n    return ../../etc").startswith("def-read-self-return-etc-")
    assert slug_of("ä ☃").isalnum()
    assert slug_of("a") != slug_of("A") != slug_of("A", "7")
    assert len(slug_of("x y " * 100)) < 60


def test_cantors_pairs():
    """Counted along diagonals: (0, 0), (1, 0), (0, 1), (2, 0), ..."""
    order = [(total - latent, latent) for total in range(60) for latent in range(total + 1)]
    assert [paired(*pair) for pair in order] == list(range(len(order)))
    assert [unpaired(number) for number in range(len(order))] == order
    assert unpaired(paired(31, 2_500_000)) == (31, 2_500_000)


def test_circuit_tracers_json_comes_back(graph):
    latent = int(np.flatnonzero(graph.kind == LATENT)[0])
    key = (int(graph.coder[latent]), int(graph.index[latent]))
    written = json.loads(json.dumps(to_json(graph, "some", {key: "</script> & co"}, "set", 0.8), allow_nan=False))
    assert set(written) == {"metadata", "qParams", "nodes", "links"}
    assert written["metadata"]["schema_version"] == 1
    assert len({node["node_id"] for node in written["nodes"]}) == len(graph)
    types = ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
    by_type = {kind: [node for node in written["nodes"] if node["feature_type"] == kind] for kind in types}
    assert [len(nodes) for nodes in by_type.values()] == [(graph.kind == kind).sum() for kind in (LATENT, ERROR, TOKEN, LOGIT)]
    one = by_type["cross layer transcoder"][0]
    layer, index, position = int(graph.layer[latent]), int(graph.index[latent]), int(graph.position[latent])
    assert one["node_id"] == f"{layer}_{index}_{position}"
    assert one["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    assert one["jsNodeId"] == f"{layer}_{index}-0"
    assert one["clerp"] == "</script> & co"
    assert by_type["logit"][0]["layer"] == "4"
    assert by_type["logit"][0]["is_target_logit"]
    assert max(node["influence"] for node in written["nodes"] if node["influence"] is not None) <= 1 + 1e-9
    found = from_json(written, "some.json")
    assert found.facts.labels[f"{layer}_{index}"] == "</script> & co"
    for name in ("kind", "layer", "position", "index", "activation", "start"):
        np.testing.assert_allclose(getattr(found, name), getattr(graph, name), rtol=1e-6)
    assert np.array_equal(found.edges.source, graph.edges.source)
    np.testing.assert_allclose(found.influence, graph.influence)


@pytest.mark.parametrize("damage", [{"nodes": []}, {"nodes": 3}, {"links": [{"source": "1", "target": "2", "weight": 1}]}, {}])
def test_other_json_is_one_line(graph, damage):
    written = to_json(graph, "some", {}, "set") | damage if damage else []
    with pytest.raises(DataError, match=r"some.json: is no graph of circuit-tracer's schema 1"):
        from_json(written, "some.json")


def test_the_strongest_paths_are_those_of_all_paths(gemma2, prompt):
    graph = attribute(gemma2, CODERS, prompt).pruned(0.3, 0.5)
    shares = graph.edges.shares(len(graph))
    into: dict[int, list[tuple[int, float]]] = {}
    for source, target, share in zip(graph.edges.source, graph.edges.target, shares, strict=True):
        into.setdefault(int(target), []).append((int(source), float(share)))

    def every(node: int, share: float) -> list[float]:
        return [one for source, part in into[node] for one in every(source, share * part)] if node in into else [share]

    total = graph.start.sum()
    targets = np.flatnonzero(graph.start)
    want = sorted((one for node in targets for one in every(int(node), graph.start[node] / total)), reverse=True)
    found = strongest_paths(graph, 20)
    np.testing.assert_allclose([path.share for path in found], want[:20])
    assert all(graph.start[path.nodes[-1]] > 0 for path in found)
    assert {path.sign for path in found} <= {-1, 1}
