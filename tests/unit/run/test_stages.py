"""Every stage's config, derived once; whatever a stage would refuse is refused here, in one line that names the field."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from everyscope.base.errors import ConfigError, EveryscopeError, MissingExtra, ModelError, TextError
from everyscope.cli.main import main
from everyscope.run import checks
from everyscope.run.checks import check
from everyscope.run.config import RunConfig
from everyscope.run.find import RECIPES, find_recipe
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.settings import SaeGroup
from everyscope.run.stages import ActivationSource, stages_of
from everyscope.sites.names import Site


@pytest.mark.parametrize("name", RECIPES)
def test_all_stages_of_every_shipped_recipe_are_derived_and_no_sae_is_lost(name, tmp_path):
    config = find_recipe(name)
    stages = stages_of(config, tmp_path)
    for part in stages.parts:
        assert part.config.all_sites == tuple(dict.fromkeys(group.coder_site for group in part.train))
        assert part.harvest.sites == part.config.all_places
        wanted = sum(len(part.config.sites(group)) * len(part.config.saes_of(group)) for group in part.config.groups)
        assert sum(len(group.saes) for group in part.train) == wanted
        assert part.harvest.num_tokens <= max(group.num_tokens for group in part.train)
        assert part.evaluate.shards == part.harvest.out
    assert stages.describe.scores == stages.parts[0].evaluate.out == stages.publish.scores
    assert all(comparison.evaluate == stages.parts[0].evaluate for comparison in stages.comparisons)
    assert list(tmp_path.iterdir()) == []
    json.dumps(stages.as_json())


def test_where_training_reads_from_servers_there_may_be_no_shards(tmp_path):
    config = find_recipe("tiny")
    stages = stages_of(config, tmp_path, servers=ActivationSource("flight://10.0.0.1:8815", "any"), harvests=False)
    orders = {(group.order, group.coder_site.kind == "transcoder") for group in stages.groups}
    assert orders == {("any", False), ("fixed", True)}, "two sites' rows belong together in fixed order alone"
    assert all(group.source == f"flight://10.0.0.1:8815/{group.site.folder}" for group in stages.groups)
    assert stages.parts[0].evaluate.shards is None
    (tmp_path / "shards").mkdir()
    assert stages_of(config, tmp_path, harvests=False).parts[0].evaluate.shards == tmp_path / "shards"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--groups.0.widths 64 64", "groups: 2 SAEs named width_64_l0_12_seed_0"),
        ("--groups.0.num-tokens 5", "num_tokens=5 is less than one batch of batch_rows=256"),
        ("--groups.0.sparsity-coefficients 0.001", "both are given"),
        ("--train.latent-shards 4096", "settings.latent_shards=4096: an SAE of width 512"),
        ("--train.replicas 3", "batch_rows=256 does not divide by replicas=3"),
        ("--groups.0.layers 4", "layers 0 to 3"),
        ("--preset.prefix-shares 0.0001 0.0002 1.0", "too narrow"),
    ],
)
def test_a_contradiction_is_one_short_line_before_anything_is_written(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "tiny", "--out", str(tmp_path / "run"), *flags.split()])
    assert caught.value.code == 1
    line = capsys.readouterr().err.strip()
    assert words in line
    assert "\n" not in line
    assert len(line) < 250
    assert not (tmp_path / "run").exists()


def changed(config: RunConfig, part: str, **fields) -> RunConfig:
    return config.model_copy(update={part: getattr(config, part).model_copy(update=fields)})


@pytest.mark.parametrize(
    ("name", "fields", "error", "words"),
    [
        ("train", {"device": "cuda:77"}, ConfigError, "train.device='cuda:77' cannot be used"),
        ("train", {"device": "gpu"}, ConfigError, "train.device='gpu'"),
        ("model", {"device": "cuda:77"}, ConfigError, "model.device='cuda:77'"),
        ("model", {"name": "/nowhere/model"}, ModelError, "/nowhere/model"),
        ("shape", {"d_model": 7}, ConfigError, "set shape.d_model=128"),
        ("text", {"source": "files", "paths": (Path("/nowhere/text"),)}, TextError, "text.paths.*/nowhere/text"),
        ("text", {"source": "dataset", "dataset": "somebody/something"}, MissingExtra, r"everyscope\[data\]"),
        ("model", {"device_map": "auto"}, MissingExtra, r"everyscope\[large\]"),
    ],
)
def test_what_this_machine_lacks_is_found_before_the_first_stage(name, fields, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda package: None)
    stages = stages_of(changed(find_recipe("tiny"), name, **fields), tmp_path)
    with pytest.raises(error, match=words):
        check(stages, EngineConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_stage_is_not_held_up_by_what_another_needs(tmp_path):
    stages = stages_of(changed(find_recipe("tiny"), "model", name="/nowhere/model"), tmp_path)
    check(stages, EngineConfig(), ("train",))
    check(stages, EngineConfig(), ("publish",))
    with pytest.raises(EveryscopeError):
        check(stages, EngineConfig(), ("describe",))


def test_a_dry_run_shows_what_a_run_would_do_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    main(["run", "tiny", "--out", str(out), "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    stages = stages_of(find_recipe("tiny"), out)
    assert found == json.loads(json.dumps(stages.as_json()))
    main(["run", "tiny", "--out", str(out), "--dry-run"])
    shown = capsys.readouterr().out
    assert "93 SAEs in 22 groups on cpu" in shown
    assert not out.exists()


def test_transcoders_harvest_both_places_and_train_from_both():
    groups = (
        SaeGroup(
            sites=("transcoder", "mlp_out"), layers=(1, 2), widths=(64,), target_l0s=(8,), skips=(False, True), num_tokens=2**12
        ),
    )
    config = find_recipe("tiny").model_copy(update={"groups": groups, "instruction_tuned": None, "random_weights": None})
    stages = stages_of(config, Path("run"), servers=ActivationSource("flight://a:1"))
    places = {Site(kind, layer) for kind in ("mlp_in", "mlp_out") for layer in (1, 2)}
    assert set(stages.parts[0].harvest.sites) == places
    groups = {str(group.coder_site): group for group in stages.groups}
    assert set(groups) == {"transcoder layer 1", "transcoder layer 2", "mlp_out layer 1", "mlp_out layer 2"}
    group, sae = groups["transcoder layer 2"], groups["mlp_out layer 2"]
    assert (group.shards, group.target_shards) == (Path("run/shards/mlp_in/layer_2"), Path("run/shards/mlp_out/layer_2"))
    assert (group.source, group.target_source) == ("flight://a:1/mlp_in/layer_2", "flight://a:1/mlp_out/layer_2")
    assert group.out == Path("run/train/transcoder/layer_2")
    assert [one.skip for one in group.saes] == [False, True]
    assert not any(one.preset.encoder_follows for one in group.saes)
    assert ([one.skip for one in sae.saes], sae.target, sae.saes[0].preset) == ([False], None, config.preset)
    with pytest.raises(ValidationError, match="only transcoders have a skip"):
        SaeGroup(sites=("mlp_out",), widths=(64,), target_l0s=(8,), skips=(True,), num_tokens=2**12)


def test_the_released_transcoders_of_gemma_2_2b():
    stages = stages_of(find_recipe("gemma_2_2b_transcoders"), Path("run"))
    assert [group.coder_site for group in stages.groups] == [Site("transcoder", layer) for layer in range(26)]
    assert {(sae.width, sae.skip) for group in stages.groups for sae in group.saes} == {(2**14, False)}
    assert len(stages.parts[0].harvest.sites) == 52
