"""What is published, from where, and under which name."""

from pathlib import Path

from everyscope.base.schema import Schema


class PublishConfig(Schema):
    """One suite, made from a run's trained SAEs and their scores."""

    trained: Path
    """Folder written by `everyscope train`."""
    scores: Path
    """Folder written by `everyscope evaluate`."""
    out: Path
    """The suite's folder: copy it anywhere, upload it as it is."""
    title: str
    """The suite's name, for people, as in `Tiny scope`."""
    model: str
    """The language model as others should find it: a bundled model's name, or a hub id."""
    license: str | None = None
    """Licence of the SAEs for the model card, as the hub spells it (apache-2.0); None leaves it open."""
