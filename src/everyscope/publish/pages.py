"""The two pages of a suite: the model card and the report, with the report's figures beside it."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from everyscope.base.files import write_text
from everyscope.base.progress import human_count, meter
from everyscope.publish.drawing.pictures import FORMATS, key_svg, panel_svg, write_picture
from everyscope.publish.evidence import Evidence
from everyscope.publish.sections.cost import cost_section
from everyscope.publish.sections.depth import depth_section
from everyscope.publish.sections.fidelity import fidelity_section
from everyscope.publish.sections.firing import firing_section
from everyscope.publish.sections.massive import massive_section
from everyscope.publish.sections.positions import positions_section
from everyscope.publish.sections.precision import precision_section
from everyscope.publish.sections.probing import probing_section
from everyscope.publish.sections.ranking import ranking_section
from everyscope.publish.sections.section import ReportCell, ReportTable, Section
from everyscope.publish.sections.splitting import splitting_section
from everyscope.publish.sections.subsets import subsets_section
from everyscope.publish.sections.transfer import transfer_section
from everyscope.publish.sections.uniformity import uniformity_section
from everyscope.publish.sections.widths import widths_section
from everyscope.publish.table import columns_of, row_keys, row_texts, ties_of, warnings_of
from everyscope.suite.layout import CARD_FILE, REPORT_FILE, SAEBENCH_FOLDER, TABLE_FILE, width_label
from everyscope.suite.records import SuiteIndex

SECTIONS: tuple[Callable[[Evidence], Section | None], ...] = (
    fidelity_section,
    massive_section,
    depth_section,
    positions_section,
    widths_section,
    splitting_section,
    transfer_section,
    subsets_section,
    precision_section,
    firing_section,
    uniformity_section,
    probing_section,
    ranking_section,
    cost_section,
)
"""Each gives None where what it shows was not measured."""


def sections_of(evidence: Evidence) -> list[Section]:
    """All sections that the evidence can fill."""
    return [section for make in SECTIONS if (section := make(evidence)) is not None]


TEMPLATES = Path(__file__).parent / "templates"


def write_report(suite: Path, evidence: Evidence) -> list[str]:
    """report/index.html, one file that needs nothing else, and every figure as PDF and PNG beside it; their paths.

    Figures of an earlier report that this one does not have are deleted.
    """
    folder, sections = (suite / REPORT_FILE).parent, sections_of(evidence)
    pictures = [(picture, section) for section in sections for picture in section.pictures]
    with meter("report", len(pictures), "figures") as progress:
        for picture, section in pictures:
            write_picture(folder, picture, section.basis)
            progress.advance()
    names = [name for picture, _ in pictures for name in picture.files]
    for form in FORMATS:
        for path in folder.glob(f"*.{form}"):
            if path.name not in names:
                path.unlink()
    write_text(suite / REPORT_FILE, _render("report.html.j2", autoescape=True, **_report_context(evidence, sections)))
    return [REPORT_FILE, *((Path(REPORT_FILE).parent / name).as_posix() for name in names)]


def write_card(suite: Path, index: SuiteIndex, license_name: str | None) -> None:
    """README.md: the model card, with the suite's table."""
    ties, columns = ties_of(index), columns_of(index)
    texts = [row_texts(sae, ties[sae.folder]) for sae in index.saes]
    context = {
        "index": index,
        "columns": columns,
        "rows": [[row[name] for name in columns] for row in texts],
        "warnings": warnings_of(index),
        "license": license_name,
        "example": next((sae for sae in index.saes if sae.metrics.is_canonical), index.saes[0]),
        "table": TABLE_FILE,
        "saebench": SAEBENCH_FOLDER,
    }
    write_text(suite / CARD_FILE, _render("card.md.j2", autoescape=False, **context))


def _render(template: str, *, autoescape: bool, **context: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["count"] = human_count
    return environment.get_template(template).render(context)


def _report_context(evidence: Evidence, sections: list[Section]) -> dict[str, Any]:
    return {
        "index": evidence.index,
        "headlines": headlines(evidence),
        "sections": [*sections, suite_section(evidence)],
        "is_text": lambda table, column: bool(table.rows) and not isinstance(table.rows[0][column].key, int | float),
        "panel_svg": panel_svg,
        "key_svg": key_svg,
    }


def headlines(evidence: Evidence) -> list[tuple[str, str]]:
    """The few numbers at the top of the report: value, and what it is."""
    saes, canonical = evidence.index.saes, evidence.canonical
    recovered = [sae.metrics.loss_recovered for sae in canonical if sae.metrics.loss_recovered is not None]
    beats = sum(not sae.metrics.beaten_by for sae in saes)
    found = [
        (str(len(saes)), f"SAEs at {len(evidence.chosen)} sites, of which {len(canonical)} canonical: one a site and width"),
        (f"{median(sae.metrics.fvu_usual for sae in canonical):.3f}", "median FVU of these"),
        (f"{median(sae.metrics.delta_loss for sae in canonical):.3f}", "median delta loss of these [nats/token]"),
    ]
    if recovered:
        found.append((f"{median(recovered):.3f}", f"median loss recovered (lowest {min(recovered):.3f})"))
    narrow = min(sae.width for sae in saes)
    dead = median(sae.metrics.dead_fraction for sae in saes if sae.width == narrow)
    return [
        *found,
        (f"{dead:.1%}", f"median share of dead latents, width {width_label(narrow)}"),
        (f"{beats}/{len(saes)}", "SAEs explain more than PCA and single neurons of their L0"),
    ]


def suite_section(evidence: Evidence) -> Section:
    """Every SAE, in a table."""
    ties, columns = ties_of(evidence.index), columns_of(evidence.index)
    rows = []
    for sae in evidence.index.saes:
        tied = ties[sae.folder]
        soft = {"FVU": tied.fvu, "delta loss": tied.delta_loss}
        texts, keys, link = row_texts(sae, tied), row_keys(sae), f"../{sae.folder}/"
        rows.append(
            tuple(
                ReportCell(texts[name], keys[name], link if name == "site" else None, soft.get(name, False)) for name in columns
            )
        )
    return Section(
        anchor="saes",
        title="Every SAE",
        basis=evidence.basis,
        says="● marks the canonical SAE of a site and width; = and grey mark what ties with an SAE of the same site and like L0.",
        notes=(
            "L0 in latents, delta loss in nats/token, ± half of the interval; dead: fires on no token; dense: fires on more "
            "than a tenth. n/a: what the mean in the activations’ place costs is within its noise.",
            *(f"{warning[0].upper()}{warning[1:]}" for warning in warnings_of(evidence.index)),
        ),
        table=ReportTable(columns, tuple(rows)),
    )
