"""Graphs and interventions that pages ask of a real, tiny model."""

from pathlib import Path

import numpy as np
import pytest
from random_transcoders import transcoder
from transcoder_suite import write_transcoder_suite

from everyscope.base.errors import ConfigError, EveryscopeError, TextError
from everyscope.browse import live_model
from everyscope.browse.live import AblationRequest, CircuitRequest, Stopped
from everyscope.browse.live_model import SuiteModel
from everyscope.circuits.attribution import attribute
from everyscope.circuits.config import Latent, TargetTokens
from everyscope.circuits.files import read_graph
from everyscope.circuits.graph import LATENT, Graph
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model

PROMPT = "def read(self, name):"


def no_news(done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module")
def live(tiny_random_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SuiteModel:
    coders = {layer: transcoder(layer, 32, 64) for layer in range(2)}
    return SuiteModel(write_transcoder_suite(tmp_path_factory.mktemp("live") / "suite", str(tiny_random_model_folder), coders))


def drawn(live: SuiteModel, request: CircuitRequest, path: Path) -> Graph:
    live.draw(request, path, say=no_news)
    return read_graph(path)


def test_a_page_draws_what_the_command_draws(live, tmp_path, tiny_random_model_folder):
    graph = drawn(live, CircuitRequest(PROMPT), tmp_path / "graph")
    model = load_language_model(ModelConfig(name=str(tiny_random_model_folder)))
    same = attribute(model, live_model.coders_of(live._suite), PROMPT)
    assert graph.facts.prompt == same.facts.prompt == PROMPT
    assert graph.facts.token_ids == same.facts.token_ids
    np.testing.assert_allclose(graph.edges.weight, same.edges.weight, rtol=1e-5, atol=1e-7)


def test_a_token_of_the_prompt_is_explained_from_those_before_it(live, tmp_path):
    whole = drawn(live, CircuitRequest(PROMPT), tmp_path / "whole")
    graph = drawn(live, CircuitRequest(PROMPT, position=4), tmp_path / "graph")
    assert graph.facts.token_ids == whole.facts.token_ids[:4]
    assert [target.token for target in graph.facts.targets] == [whole.facts.token_ids[4]]
    asked = drawn(live, CircuitRequest(PROMPT, 4, TargetTokens((9,))), tmp_path / "asked")
    assert [target.token for target in asked.facts.targets] == [9]


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (CircuitRequest(PROMPT, 0), ConfigError, "tokens 1 to"),
        (CircuitRequest(PROMPT, 99), ConfigError, "tokens 1 to"),
        (CircuitRequest(PROMPT, None, TargetTokens(("never one token",))), ConfigError, "tokens ("),
        (CircuitRequest(PROMPT, None, Latent(0, 1, 999)), ConfigError, "not active"),
        (CircuitRequest("a b " * 400), TextError, "tokens"),
    ],
)
def test_what_cannot_be_drawn_is_said(live, tmp_path, request_: CircuitRequest, kind: type[EveryscopeError], words: str):
    with pytest.raises(kind, match=words.replace("(", "[(]")):
        drawn(live, request_, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_it_says_how_far_it_is_and_stops_when_nobody_waits(live, tmp_path):
    said: list[tuple[int, int]] = []
    live.draw(CircuitRequest(PROMPT), tmp_path / "graph", say=lambda done, of: said.append((done, of)))
    assert said[0][0] == 0
    assert [done for done, _ in said] == sorted({done for done, _ in said})
    assert said[-1][0] == (read_graph(tmp_path / "graph").kind == LATENT).sum()
    with pytest.raises(Stopped, match="shorten the prompt"):
        live.draw(CircuitRequest(PROMPT), tmp_path / "other", say=no_news, stop=lambda: True)
    assert not (tmp_path / "other").exists()


def test_a_graph_that_runs_out_of_time_keeps_its_sums(live, tmp_path, monkeypatch):
    monkeypatch.setattr(live_model, "GRAPH_SECONDS", 1e-9)
    graph = drawn(live, CircuitRequest(PROMPT), tmp_path / "graph")
    assert not (graph.kind == LATENT).any()
    sent = np.bincount(graph.edges.target, graph.edges.weight, len(graph)) + graph.rest + graph.bias
    np.testing.assert_allclose(sent[graph.start > 0], graph.pre[graph.start > 0], rtol=1e-4)


def test_ablation_removes_latents_in_the_model(live, tmp_path):
    graph = drawn(live, CircuitRequest(PROMPT), tmp_path / "graph")
    node = int(np.flatnonzero(graph.kind == LATENT)[np.argmax(graph.influence[graph.kind == LATENT])])
    latent = Latent(int(graph.layer[node]), int(graph.position[node]), int(graph.index[node]))
    removed, nothing = live.ablate(graph, AblationRequest(((latent,), ())))
    assert (node, -graph.activation[node]) in [(place, pytest.approx(change)) for place, _, change in removed.latents]
    assert len(removed.targets) == len(graph.facts.targets)
    assert all(measured for measured, _ in removed.targets)
    (same,) = live.ablate(graph, AblationRequest(((latent,),), factor=1.0))
    for one in (nothing, same):  # but for what passes of other sizes round differently
        np.testing.assert_allclose(one.targets, 0.0, atol=1e-5)
        assert all(before == pytest.approx(after, abs=1e-6) for _, before, after in one.tokens)


def test_a_model_in_bfloat16_gives_graphs_in_float32(live, tmp_path, tiny_random_model_folder):
    coarse = SuiteModel(live._suite.root, ModelConfig(name=str(tiny_random_model_folder), dtype="bfloat16"))
    graph = drawn(coarse, CircuitRequest(PROMPT), tmp_path / "graph")
    assert graph.largest_violation < 1e-5
    assert len(coarse.ablate(graph, AblationRequest(((),)))) == 1
