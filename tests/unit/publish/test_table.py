import re
from pathlib import Path

import pytest
from rich.console import Console

from everyscope.publish.config import PublishConfig
from everyscope.publish.table import suite_table, ties_of
from everyscope.suite.numbers import number_text
from everyscope.suite.reader import load_suite
from everyscope.suite.records import SuiteIndex


def with_l0_and_fvu(index: SuiteIndex, numbers: list[tuple[float, float, float]]) -> SuiteIndex:
    """The suite's first SAEs, at one site, with these L0s, FVUs and halves of intervals."""
    saes = []
    for sae, (l0, fvu, half) in zip(index.saes, numbers, strict=False):
        ends = (fvu - half, fvu + half)
        intervals = sae.metrics.intervals.model_copy(update={"fvu_usual": ends, "delta_loss": ends})
        changes = {"l0": l0, "fvu": fvu, "fvu_usual": fvu, "delta_loss": fvu, "loss_recovered": 0.97, "intervals": intervals}
        metrics = sae.metrics.model_copy(update=changes)
        saes.append(sae.model_copy(update={"metrics": metrics, "layer": 0, "site": "resid_post"}))
    return index.model_copy(update={"saes": tuple(saes)})


def test_ties_are_with_saes_of_the_same_site_and_like_l0(published: PublishConfig):
    numbers = [(20, 0.20, 0.02), (22, 0.17, 0.02), (23, 0.10, 0.02), (50, 0.10, 0.02)]
    index = with_l0_and_fvu(load_suite(published.out).index, numbers)
    assert [ties.fvu for ties in ties_of(index).values()] == [True, True, False, False]


@pytest.mark.parametrize(
    ("value", "interval", "is_tied", "text"),
    [
        (0.1394, (0.1351, 0.1429), False, "0.139±.004"),
        (0.1394, (0.1351, 0.1429), True, "= 0.139±.004"),
        (0.005, (0.00499, 0.00501), False, "0.005±.001"),
        (-0.01, None, False, "-0.010"),
        (1.5, (0.5, 2.5), False, "1.500±1.000"),
    ],
)
def test_numbers_stand_with_half_their_interval_rounded_up(value: float, interval, is_tied: bool, text: str):
    assert number_text(value, interval, is_tied) == text


def test_the_terminal_table_fits_80_columns_and_marks_canonical_saes(published: PublishConfig):
    index = load_suite(published.out).index
    numbers = [(27.0, 0.139, 0.004), (25.1, 0.141, 0.004), (50.9, 0.071, 0.001)] * 12
    index = with_l0_and_fvu(index, numbers)
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(suite_table(index))
    text = console.export_text()
    assert "…" not in text
    assert text.count("resid_post") == 36
    assert len(re.findall(r"● \d", text)) == 12
    assert "= 0.139±.004" in text


def test_massive_tokens_and_undertrained_saes_are_said_in_80_columns(published: PublishConfig):
    numbers = [(27.0, 0.139, 0.004), (25.1, 0.141, 0.004), (150.9, 0.071, 0.001)] * 12
    index = with_l0_and_fvu(load_suite(published.out).index, numbers)
    worse = {"num_massive_tokens": 7, "fvu": 0.021, "baselines_fvu": {"pca": 0.9, "neuron_basis": 0.01}}
    saes = [sae.model_copy(update={"metrics": sae.metrics.model_copy(update=worse)}) for sae in index.saes[:3]]
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(suite_table(index.model_copy(update={"saes": (*saes, *index.saes[3:])})))
    text = " ".join(console.export_text().split())
    assert "…" not in text
    assert "= 0.139±.004 * 0.021" in text
    assert "Massive tokens: at 1 of 1 sites" in text
    assert "Undertrained: 3 of 36 SAEs, marked *, leave more variance unexplained than single neurons at their L0" in text


def test_the_card_shows_every_sae_and_pictures_that_are_there(published: PublishConfig):
    card = (published.out / "README.md").read_text()
    assert sum(line.startswith(("| attn_out", "| mlp_out", "| resid_post")) for line in card.splitlines()) == 36
    assert card.count("| ● ") == 12
    pictures = re.findall(r"\((report/[^)]+)\)", card)
    assert len(pictures) == 2
    for picture in pictures:
        assert (published.out / picture).read_bytes().startswith(b"\x89PNG")
