import pytest

from everyscope.base.errors import ConfigError
from everyscope.sites.names import SUBLAYERS, Site, parse_folder, sites_of


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
