"""The table of a suite: texts for pages, and a rendering for terminals.

Numbers stand with half their interval's width, rounded up. A canonical SAE is marked ●. What ties with an SAE of the same site
and like L0, so that nobody can say which is better, is marked = and greyed. FVU is that of usual tokens; where massive ones
change it anywhere in the suite, plain FVU has a column of its own. An SAE that a baseline beats is marked *.
"""

from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from everyscope.suite.layout import width_label
from everyscope.suite.numbers import number_text
from everyscope.suite.records import RIVALS, SaeRecord, SuiteIndex
from everyscope.suite.ties import estimate, rank_spans

COLUMNS = ("site", "layer", "width", "L0", "FVU", "plain FVU", "FVU of PCA", "delta loss", "recovered", "dead", "dense")
"""Headings, in the order of a row's cells."""
HEADINGS = {"plain FVU": "plain\nFVU", "FVU of PCA": "FVU of\nPCA", "delta loss": "delta\nloss", "recovered": "recov."}
"""Those that a terminal shows otherwise, in two lines or cut."""
NOT_KNOWN = "n/a"
"""Stands for a share of a cost that is within its noise."""
LIKE_L0 = 1.25
"""L0s that differ by no more than this factor count as alike [1]."""


@dataclass(frozen=True)
class Ties:
    """Whether an SAE's numbers tie with a rival's: one of the same site and like L0."""

    fvu: bool
    delta_loss: bool


def ties_of(index: SuiteIndex) -> dict[str, Ties]:
    """By folder: which numbers of an SAE tie with those of a rival."""
    found = {}
    for sae in index.saes:
        rivals = [one for one in index.saes if one.where == sae.where and _is_like(one.metrics.l0, sae.metrics.l0)]
        place = rivals.index(sae)
        fvu = rank_spans([estimate(one.metrics.fvu_usual, one.metrics.intervals.fvu_usual) for one in rivals])[place]
        delta = rank_spans([estimate(one.metrics.delta_loss, one.metrics.intervals.delta_loss) for one in rivals])[place]
        found[sae.folder] = Ties(fvu[0] != fvu[1], delta[0] != delta[1])
    return found


def _is_like(one: float, other: float) -> bool:
    return one <= LIKE_L0 * other and other <= LIKE_L0 * one


def columns_of(index: SuiteIndex) -> tuple[str, ...]:
    """The headings that a suite needs: plain FVU only where some of its SAEs meet massive tokens."""
    has_massive = any(sae.metrics.num_massive_tokens for sae in index.saes)
    return tuple(name for name in COLUMNS if has_massive or name != "plain FVU")


def row_texts(sae: SaeRecord, ties: Ties) -> dict[str, str]:
    """The cells of one SAE as text, by heading."""
    metrics, recovered = sae.metrics, sae.metrics.loss_recovered
    texts = (
        sae.site,
        str(sae.layer),
        width_label(sae.width),
        f"{'● ' if metrics.is_canonical else ''}{metrics.l0:.1f}",
        number_text(metrics.fvu_usual, metrics.intervals.fvu_usual, ties.fvu) + (" *" if metrics.beaten_by else ""),
        f"{metrics.fvu:.3f}",
        f"{metrics.fvu_pca_usual:.3f}",
        number_text(metrics.delta_loss, metrics.intervals.delta_loss, ties.delta_loss),
        NOT_KNOWN if recovered is None else f"{recovered:.3f}",
        f"{metrics.dead_fraction:.1%}",
        f"{metrics.dense_fraction:.{0 if metrics.dense_fraction >= 0.1 else 1}%}",
    )
    return dict(zip(COLUMNS, texts, strict=True))


def row_keys(sae: SaeRecord) -> dict[str, float | str | None]:
    """What the cells of one SAE are sorted by, by heading."""
    metrics = sae.metrics
    fvus = (metrics.fvu_usual, metrics.fvu, metrics.fvu_pca_usual)
    numbers = (metrics.l0, *fvus, metrics.delta_loss, metrics.loss_recovered, metrics.dead_fraction, metrics.dense_fraction)
    return dict(zip(COLUMNS, (sae.site, sae.layer, sae.width, *numbers), strict=True))


def warnings_of(index: SuiteIndex) -> list[str]:
    """What readers of the table must know of its FVUs: massive tokens, SAEs that are worse than a baseline; a sentence each."""
    found, massive = [], [sae for sae in index.saes if sae.metrics.num_massive_tokens]
    if massive:
        sites, most = {sae.where for sae in massive}, max(massive, key=lambda sae: sae.metrics.num_massive_tokens)
        found.append(
            f"massive tokens: at {len(sites)} of {len({sae.where for sae in index.saes})} sites some activations have many "
            f"times the median norm, most at {most.where}: {most.metrics.num_massive_tokens:,} of "
            f"{index.measured.num_tokens:,} tokens; "
            "they stay as they are when an SAE is spliced in, and count in plain FVU alone."
        )
    beaten = [sae for sae in index.saes if sae.metrics.beaten_by]
    if beaten:
        rivals = [words for words in RIVALS.values() if any(words in sae.metrics.beaten_by for sae in beaten)]
        found.append(
            f"undertrained: {len(beaten)} of {len(index.saes)} SAEs, marked *, leave more variance unexplained than "
            f"{' or '.join(rivals)} at their L0; train these on more tokens."
        )
    return found


def suite_table(index: SuiteIndex) -> Table:
    """The suite for a terminal; delta loss in nats/token, fractions of 1."""
    measured = index.measured
    table = Table(
        box=box.SIMPLE,
        padding=0,  # columns stand a space apart by the box alone, so that 80 hold the table
        show_edge=False,
        title=f"{index.title}: {len(index.saes)} SAEs of {index.model}",
        caption=(
            f"{measured.data}; {measured.num_tokens:,} tokens, {measured.mask}; delta loss in nats/token; ± half of the "
            f"{measured.interval_level:.0%} interval over {measured.num_documents:,} documents; ● canonical; = ties with an "
            "SAE of the same site and like L0" + "".join(f"\n{warning[0].upper()}{warning[1:]}" for warning in warnings_of(index))
        ),
    )
    columns = columns_of(index)
    if "plain FVU" in columns:  # then 80 columns do not hold all of them
        columns = tuple(name for name in columns if name not in ("recovered", "dense"))
    for name in columns:
        table.add_column(HEADINGS.get(name, name), justify="left" if name == "site" else "right", no_wrap=True)
    ties = ties_of(index)
    for sae, following in zip(index.saes, [*index.saes[1:], None], strict=True):
        table.add_row(*_cells(sae, ties[sae.folder], columns), end_section=following is not None and sae.where != following.where)
    return table


def _cells(sae: SaeRecord, ties: Ties, columns: tuple[str, ...]) -> list[Text]:
    """The texts of one SAE with their styles: ties greyed, canonical L0s bold."""
    styles = {"FVU": "dim" if ties.fvu else "", "delta loss": "dim" if ties.delta_loss else ""}
    styles["L0"] = "bold" if sae.metrics.is_canonical else ""
    texts = row_texts(sae, ties)
    return [Text(texts[name], style=styles.get(name, "")) for name in columns]
