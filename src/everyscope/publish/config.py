"""What is published, from where, and under which name."""

from pathlib import Path

from pydantic import Field

from everyscope.base.schema import Schema


class PublishConfig(Schema):
    """One suite, made from a run's trained SAEs and their scores."""

    trained: Path
    """Folder written by `everyscope train`."""
    scores: Path
    """Folder written by `everyscope evaluate`."""
    descriptions: Path | None = None
    """Folder written by `everyscope describe` and `everyscope explain`; None, or one that is not there, publishes none."""
    out: Path
    """The suite's folder; it can be copied anywhere and uploaded unchanged."""
    title: str
    """The suite's name, for people, as in `Tiny scope`."""
    model: str
    """The language model as others should find it: a bundled model's name, or a hub id."""
    license: str | None = None
    """Licence of the SAEs for the model card, as the hub spells it (apache-2.0); None leaves it open."""
    canonical_l0: float | None = Field(default=None, gt=0)
    """The SAE of each site and width whose L0 is nearest to this stands for it; None takes the middle one of the L0s that they
    were trained to reach, or 100 where they had none to reach [latents]."""
