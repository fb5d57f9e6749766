import pytest

from everyscope.base.errors import ConfigError
from everyscope.sites.names import SUBLAYERS, BySite, Site, as_site, parse_folder, sites_in, sites_of


def test_folders_name_sites_and_back():
    for site in sites_of(("embed", *SUBLAYERS), None, 12):
        assert parse_folder(site.folder) == site


@pytest.mark.parametrize(
    "folder", ["resid_post", "resid_post/layer_", "resid_post/layer_-1", "resid/layer_1", "", "embed/layer_1"]
)
def test_what_is_no_folder_of_a_site_is_refused(folder):
    with pytest.raises(ConfigError):
        parse_folder(folder)


def test_impossible_sites_are_refused():
    for kind, layer in [("resid", 0), ("mlp_out", -1), ("embed", 1)]:
        with pytest.raises(ConfigError):
            Site(kind, layer)


def test_sites_come_once_each_in_order_of_layer():
    sites = sites_of(("mlp_out", "embed"), None, 3)
    assert sites == (Site("embed", 0), Site("mlp_out", 0), Site("mlp_out", 1), Site("mlp_out", 2))
    assert sites_of(("mlp_out",), (2, 0), 3) == (Site("mlp_out", 2), Site("mlp_out", 0))
    with pytest.raises(ConfigError, match="layer 3"):
        sites_of(("mlp_out",), (3,), 3)


@pytest.mark.parametrize("site", sites_of(("embed", *SUBLAYERS), None, 13))
def test_every_way_to_write_a_site_leads_back_to_it(site):
    names = [str(site), site.folder, site.hook_name, f"{site.kind}.{site.layer}"]
    assert {Site.parse(name) for name in names} == {site} == {as_site(site)}


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.3.hook_resid_post", Site("resid_post", 3)),
        ("blocks.3.attn.hook_z", Site("attn_out", 3)),
        ("blocks.3.hook_mlp_out", Site("mlp_out", 3)),
        ("model.layers.13", Site("resid_post", 13)),
        ("model.language_model.layers.2", Site("resid_post", 2)),
        ("transformer.h.3", Site("resid_post", 3)),
        ("gpt_neox.layers.0", Site("resid_post", 0)),
        ("layers.3", Site("resid_post", 3)),
        ("hook_embed", Site("embed", 0)),
        ("embed", Site("embed", 0)),
    ],
)
def test_names_of_other_libraries_are_known(name, site):
    assert Site.parse(name) == site


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resid_pots.3", "did you mean 'resid_post.3'"),
        ("blocks.7.hook_resid_pst", "did you mean 'blocks.7.hook_resid_post'"),
        ("blocks.3.hook_resid_pre", "the same activations are 'resid_post.2'"),
        ("blocks.0.hook_resid_pre", "the same activations are 'embed'"),
        ("blocks.3.hook_attn_out", "'attn_out.3'"),  # behind W_O: not what our attn_out is
        ("blocks.3.hook_mlp_in", "'mlp_in.3'"),  # the stream before the norm, or behind it, by who says it
        ("blocks.3.ln2.hook_normalized", "'mlp_in.3'"),
        ("model.layers.3.mlp", "did you mean 'mlp_in.3' or 'mlp_out.3'"),
        ("model.layers.3.self_attn.o_proj", "did you mean 'attn_out.3'"),
        ("resid_post", "did you mean 'resid_post.3'"),
        ("resid_post.-1", "did you mean 'resid_post.1'"),
        ("", "write it as"),
        ("lm_head", "write it as"),
    ],
)
def test_what_names_no_site_is_refused_with_the_nearest_name(name, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        as_site(name)
    assert "\n" not in str(caught.value)


def test_a_site_of_wrong_types_is_refused():
    for wrong in (3, None, ("resid_post", 3)):
        with pytest.raises(ConfigError, match="expected a site"):
            as_site(wrong)
    with pytest.raises(ConfigError, match="did you mean resid_post"):
        Site("resid_pots", 3)
    with pytest.raises(ConfigError, match="no whole number"):
        Site("resid_post", "3")


def test_one_site_or_several_come_once_each():
    one = Site("resid_post", 3)
    assert sites_in(one) == sites_in("resid_post.3") == sites_in(["model.layers.3", one]) == (one,)
    assert sites_in(("mlp_out.1", "resid_post.0")) == (Site("mlp_out", 1), Site("resid_post", 0))
    for nothing in ([], (), iter(())):
        with pytest.raises(ConfigError, match="no sites"):
            sites_in(nothing)
    with pytest.raises(ConfigError, match="expected a site or several"):
        sites_in(3)


def test_a_dict_by_site_finds_entries_by_any_name():
    found = BySite({Site("resid_post", 3): "here"})
    assert found["resid_post.3"] == found["blocks.3.hook_resid_post"] == found[Site("resid_post", 3)] == "here"
    assert "model.layers.3" in found
    assert "model.layers.4" not in found
    with pytest.raises(KeyError, match="resid_post layer 4 is not among resid_post layer 3"):
        found["resid_post.4"]
    with pytest.raises(ConfigError, match="did you mean"):
        found["resid_pots.3"]
