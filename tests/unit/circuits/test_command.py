"""`everyscope circuit` on a random model: files, tables, JSON, and one line for what cannot be done."""

import json
from pathlib import Path

import pytest
from random_transcoders import transcoder
from transcoder_suite import write_transcoder_suite

from everyscope.circuits.circuit_tracer import from_json
from everyscope.circuits.files import graphs_in, read_graph
from everyscope.circuits.graph import LATENT
from everyscope.cli.main import main

PROMPT = "def read(self"


@pytest.fixture(scope="module")
def suite(tiny_random_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    coders = {layer: transcoder(layer, 32, 64) for layer in range(2)}
    labels = {(layer, latent): f"label [bold]{layer}.{latent}" for layer in range(2) for latent in range(0, 64, 2)}
    return write_transcoder_suite(tmp_path_factory.mktemp("circuit") / "suite", str(tiny_random_model_folder), coders, labels)


def test_a_graph_is_written_beside_the_suite_and_shown(suite, capsys, tmp_path):
    foreign = tmp_path / "foreign.json"
    main(["circuit", str(suite), PROMPT, "--validate", "5", "--circuit-tracer", str(foreign)])
    shown = capsys.readouterr().out
    ((name, path),) = graphs_in(suite).items()
    assert name.startswith("def-read-self-")
    graph = read_graph(path)
    assert graph.facts.prompt == PROMPT
    assert graph.facts.coders[1].name == "transcoder/layer_1/width_64/average_l0_24"
    assert graph.largest_violation < 1e-5
    assert "replacement" in shown
    assert shown.count("5 latents removed one by one") == 2
    assert "“label [bold]" in shown
    assert "→ output" in shown
    found = from_json(json.loads(foreign.read_text()), "foreign.json")
    assert (found.kind == LATENT).sum() == (graph.pruned().kind == LATENT).sum()
    assert set(found.facts.labels.values()) <= {f"label [bold]{layer}.{latent}" for layer in range(2) for latent in range(64)}


def test_json_for_programs(suite, capsys, tmp_path):
    target = ["--target", " the", "--against", " a", "--out", str(tmp_path / "graph"), "--json", "--max-latents", "20"]
    main(["circuit", str(suite.parent), PROMPT, *target])
    found = json.loads(capsys.readouterr().out)
    assert found["targets"][0]["text"] == " the −  a"
    assert found["validation"] == {}
    assert found["violation"] < 1e-5
    assert 0 < found["coverage"] <= 1
    assert (read_graph(tmp_path / "graph").kind == LATENT).sum() == 20
    assert found["paths"][0]["share"] >= found["paths"][-1]["share"] > 0


def test_a_page_of_one_file_and_graphs_of_other_programs(suite, capsys, tmp_path):
    page, foreign, path = tmp_path / "page.html", tmp_path / "foreign.json", tmp_path / "one.graph.safetensors"
    main(["circuit", str(suite), PROMPT, "--circuit-tracer", str(foreign), "--out", str(path)])
    main(["circuit", str(suite), "--import", str(foreign), "--export", str(page)])
    assert f"Page    {page}" in capsys.readouterr().out
    assert "cannot be checked here" in page.read_text(encoding="utf-8")
    (name,) = (name for name, path in graphs_in(suite).items() if read_graph(path).facts.method == "imported")
    assert name.startswith("def-read-self-")
    main(["circuit", str(suite), "--import", str(path), "--out", str(tmp_path / "again"), "--export", str(page)])
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert "label [bold]" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a PROMPT"),
        ([PROMPT, "--latent", "1.2"], "expected layer.position.latent"),
        ([PROMPT, "--latent", "1.2.3", "--target", "a"], "leave one out"),
        ([PROMPT, "--against", "a"], "needs one --target"),
        ([PROMPT, "--target", "never one token"], "tokens ("),
        ([PROMPT, "--max-latents", "0"], "expected 1 or more"),
        ([PROMPT, "--node-share", "1.5"], "at most 1"),
        ([PROMPT, "--width", "128"], "has no transcoders of width 128, nor SAEs"),
        ([PROMPT, "--import", "graph.json"], "leave one out"),
        (["--import", "nowhere.json"], "nowhere.json"),
        ([PROMPT, "--through", "saes"], "has no SAEs at attn_out, mlp_out, resid_post"),
    ],
)
def test_what_cannot_be_done_is_one_line(suite, capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["circuit", str(suite), *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]
