"""The scores of one SAE on disk: metrics.json, which evaluating writes, and describing and publishing read. Torch-free."""

from pathlib import Path
from typing import Any

from everyscope.base.files import read_sealed
from everyscope.suite.records import Headline, Intervals

REMEDY = "delete its folder and run `everyscope evaluate` again"


def read_metrics(path: Path) -> dict[str, Any]:
    """A metrics.json of a scores folder; DamagedData where it was changed since it was written, DataError where it is missing."""
    return read_sealed(path, REMEDY)


def headline_of(metrics: dict[str, Any], *, is_canonical: bool) -> Headline:
    """What suite.json says about an SAE of these metrics; KeyError and TypeError where they are of another form."""
    made = {"intervals", "baselines_fvu", "is_canonical", "num_massive_tokens"}
    known = {name: its["fvu_usual"] for name, its in metrics["baselines"].items() if its["fvu_usual"] is not None}
    return Headline(
        **{name: metrics[name] for name in Headline.model_fields if name not in made},
        intervals=Intervals(**{name: metrics["intervals"].get(name) for name in Intervals.model_fields}),
        baselines_fvu=known,
        num_massive_tokens=metrics["massive"]["num_tokens"],
        is_canonical=is_canonical,
    )
