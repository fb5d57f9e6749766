"""Commits on the Hugging Face hub: the only names there that never change their meaning."""

import re
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, try_to_load_from_cache

HUB_SECONDS = 10
"""How long the hub may take to answer [s]."""
CACHED_FILE = {"model": "config.json", "dataset": "README.md"}
"""A file that is in the cache wherever something of a repository is."""


def hub_commit(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    """The commit that a revision stands for today or, where the hub cannot be reached, stood for when it was cached.

    None where neither hub nor cache knows it.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        return HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=HUB_SECONDS).sha
    except Exception:  # which errors stand for an unreachable hub depends on huggingface_hub's version
        return _cached(name, revision, kind)


def _cached(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    try:
        path = try_to_load_from_cache(name, CACHED_FILE[kind], revision=revision, repo_type=kind)
    except ValueError:  # no name of a repository
        return None
    return Path(path).parent.name if isinstance(path, str) else None
