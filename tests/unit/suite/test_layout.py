import pytest

from everyscope.sites.names import Site
from everyscope.suite.layout import sae_folder, width_label


@pytest.mark.parametrize(
    ("width", "label"),
    [(2**14, "16k"), (2**15, "32k"), (2**16, "65k"), (2**17, "131k"), (2**18, "262k"), (2**19, "524k"), (2**20, "1m")],
)
def test_widths_are_written_as_on_the_hub(width: int, label: str):
    assert width_label(width) == label


def test_other_widths_keep_their_digits_so_that_no_two_share_a_folder():
    assert [width_label(width) for width in (1, 512, 1000, 1024, 1025, 16000)] == ["1", "512", "1000", "1k", "1025", "16000"]
    labels = [width_label(width) for width in range(1, 70_000)]
    assert len(set(labels)) == len(labels)


def test_folders_are_those_of_the_contract():
    assert sae_folder(Site("resid_post", 3), 2**14, 70.6) == "resid_post/layer_3/width_16k/average_l0_71"
