import pytest

from everyscope.base.errors import DataError
from everyscope.sites.names import Site
from everyscope.suite.descriptions import read_order, write_order

SAES = [(Site("mlp_out", 0), "b"), (Site("mlp_out", 0), "a"), (Site("resid_post", 3), "c")]


def test_the_order_comes_back(tmp_path):
    write_order(tmp_path, SAES)
    assert read_order(tmp_path) == SAES


def test_what_is_no_order_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"saes\.json"):
        read_order(tmp_path)
    (tmp_path / "saes.json").write_text("[1]")
    with pytest.raises(DataError, match="no list of sites"):
        read_order(tmp_path)
