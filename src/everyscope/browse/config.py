"""What is browsed, and where the pages go: to a browser on this machine, or into a folder."""

from pathlib import Path

from pydantic import Field

from everyscope.base.schema import Schema


class BrowseConfig(Schema):
    """One suite, served on 127.0.0.1 alone."""

    suite: Path
    """The suite's folder, or that of the run that holds it."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """Port on 127.0.0.1, 0 for any that is free; None takes 8017 and, where that is taken, any that is free."""
    model: str | None = None
    """The suite's language model, as a local folder or hub id, where the name in suite.json does not find it."""
    open: bool = True
    """Whether the web browser is opened on the first page, where there is a screen."""
    cache: Path | None = None
    """Folder of the indexes; None takes the user's cache folder ($XDG_CACHE_HOME/everyscope/browse)."""


class ExportConfig(Schema):
    """One suite, written as pages that any web host can serve."""

    suite: Path
    """The suite's folder, or that of the run that holds it."""
    out: Path
    """Folder of the pages; it must not exist yet, be empty, or hold an earlier export, which is replaced."""
    max_latents: int | None = Field(default=None, ge=1)
    """Pages of latents per SAE, from latent 0; None writes all [latents]."""
    cache: Path | None = None
    """Folder of the indexes; None takes the user's cache folder ($XDG_CACHE_HOME/everyscope/browse)."""
