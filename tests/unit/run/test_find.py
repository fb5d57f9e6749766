"""Finding recipes, and what they derive for the stages."""

import pytest

from everyscope.base.errors import ConfigError
from everyscope.run.config import RunConfig, SaeGroup
from everyscope.run.find import RECIPES, find_recipe
from everyscope.sites.names import Site


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_resolves_and_survives_json(name):
    config = find_recipe(name)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'gemma_2_2b'.*tiny"):
        find_recipe("gemma_2_2")


def test_a_file_is_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from everyscope.run.recipes.tiny import recipe as tiny\n"
        "def recipe():\n return tiny().model_copy(update={'name': 'mine'})\n"
    )
    assert find_recipe(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must define recipe"),
        ("def recipe():\n    return 3\n", "returned int"),
        ("1 / 0", "ZeroDivisionError"),
        ("from everyscope import SaeConfig\ndef recipe():\n    return SaeConfig(width=0, sparsity_coefficient=1)\n", "width"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, text, complaint):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        find_recipe(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        find_recipe(str(tmp_path / "absent.py"))


def test_each_site_and_budget_is_one_group_with_all_its_saes(tmp_path):
    config = find_recipe("gemma_2_2b")
    groups = config.train_configs(tmp_path)
    assert len({(group.site, group.num_tokens) for group in groups}) == len(groups)
    assert sum(len(group.saes) for group in groups) == sum(
        len(config.sites(group)) * len(config.saes_of(group)) for group in config.groups
    )
    at_twelve = [group for group in groups if group.site == Site("resid_post", 12)]
    assert sorted({sae.width for group in at_twelve for sae in group.saes}) == [2**power for power in range(14, 21)]


def test_a_group_may_have_groups_of_its_own_on_several_devices(tmp_path):
    config = find_recipe("gemma_2_2b")
    *others, widest = config.groups
    own = widest.model_copy(update={"saes_per_training_group": 4, "latent_shards": 8})
    groups = config.model_copy(update={"groups": (*others, own)}).train_configs(tmp_path)
    split = [group for group in groups if group.settings.latent_shards == 8]
    assert [len(group.saes) for group in split] == [4, 2] * 3
    assert {sae.width for group in split for sae in group.saes} == {2**20}
    usual = config.train_configs(tmp_path)
    assert [group for group in groups if group not in split] == [group for group in usual if group.num_tokens < widest.num_tokens]
    assert sorted(str(sae) for group in groups for sae in group.saes) == sorted(str(sae) for group in usual for sae in group.saes)
    assert len({group.group_id for group in groups}) == len(groups)


def test_an_sae_asked_for_twice_is_refused(tmp_path):
    config = find_recipe("tiny")
    twice = config.model_copy(update={"groups": config.groups * 2})
    with pytest.raises(ConfigError, match="2 SAEs named width_512_l0_12_seed_0"):
        twice.train_configs(tmp_path)


def test_a_layer_out_of_range_names_the_range():
    config = find_recipe("tiny")
    group = SaeGroup(sites=("mlp_out",), layers=(4,), widths=(8,), sparsity_coefficients=(1e-3,), num_tokens=4096)
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        _ = config.model_copy(update={"groups": (group,)}).all_sites
