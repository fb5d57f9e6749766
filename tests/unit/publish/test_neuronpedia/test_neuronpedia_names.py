import re
from collections.abc import Callable
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.names import sources_of
from everyscope.sites.names import Site
from everyscope.suite.records import SuiteIndex, read_index


def ids(suite: Path, **fields: object) -> list[str]:
    config = NeuronpediaConfig.model_validate({"suite": suite, "out": suite / "out", **fields})
    return [source.id for source in sources_of(config, read_index(suite))]


def small(**fields: object) -> dict[str, object]:
    return {"site": Site("resid_post", 20), "width": 12, "l0": 71.2, **fields}


def test_the_canonical_sae_has_the_plain_id(make_suite: Callable[..., Path]):
    suite = make_suite(
        small(), small(l0=142.4, is_canonical=False), small(site=Site("attn_out", 3)), small(site=Site("embed", 0))
    )
    assert ids(suite, set="gemmascope") == [
        "20-gemmascope-res-12",
        "20-gemmascope-res-12__l0-142",
        "3-gemmascope-att-12",
        "e-gemmascope-emb-12",
    ]


def test_names_follow_from_the_suite(suite: Path):
    config = NeuronpediaConfig(suite=suite, out=suite)
    first = sources_of(config, read_index(suite))[0]
    assert (first.model_id, first.set_name, first.id) == ("some-model", "golden-scope-att-6", "1-golden-scope-att-6")


def test_the_width_is_spelt_as_in_gemma_scope(suite: Path):
    index = read_index(suite)
    wide = index.saes[1].model_copy(update={"width": 16384})
    index = SuiteIndex.model_validate({**index.model_dump(), "saes": [wide.model_dump()]})
    (source,) = sources_of(NeuronpediaConfig(suite=suite, out=suite, set="gemmascope"), index)
    assert source.id == "0-gemmascope-res-16k"


def test_ids_are_what_neuronpedia_takes_apart(suite: Path):
    """As its own code does: the set is what stands behind the first dash and before two underscores."""
    config = NeuronpediaConfig(suite=suite, out=suite)
    for source in sources_of(config, read_index(suite)):
        assert source.id.partition("-")[2].split("__")[0] == source.set_name
        assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", source.set_name)
        assert "--" not in source.set_name


def test_a_pattern_chooses(suite: Path):
    assert ids(suite, saes="resid_post/*/average_l0_4") == ["0-golden-scope-res-6__l0-4"]
    with pytest.raises(ConfigError, match="matches none of 3 SAEs"):
        ids(suite, saes="mlp_out/*")


@pytest.mark.parametrize(
    "fields",
    [
        {"set": "Gemma"},
        {"set": "a--b"},
        {"set": "a-"},
        {"model_id": "Gemma"},
        {"model_id": "../x"},
        {"upload": True},
        {"host": "https://h"},
        {"host": "ftp://h", "upload": True},
        {"host": "https://user:key@h", "upload": True},
        {"dry_run": True},
    ],
)
def test_impossible_configs_are_refused(suite: Path, fields: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(fields)).split("_")[0]):
        NeuronpediaConfig.model_validate({"suite": suite, "out": suite, **fields})


def test_a_title_without_letters_needs_a_name(suite: Path):
    index = read_index(suite).model_copy(update={"title": "101 ⊕"})
    with pytest.raises(ConfigError, match="--set"):
        sources_of(NeuronpediaConfig(suite=suite, out=suite), index)
