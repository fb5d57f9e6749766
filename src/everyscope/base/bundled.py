"""The models that come with the package: their names and where they lie."""

import re
from pathlib import Path

BUNDLED_FOLDER = Path(__file__).parent / "bundled_models"
BUNDLED_MODELS = ("tiny", "tiny-it")
"""`tiny`: Gemma-2 architecture, trained from scratch on the Python standard library; `tiny-it`: its instruction-tuned sibling."""

NO_CODE: dict[str, bool] = {"trust_remote_code": False}
"""For every `from_pretrained`: without it transformers asks on the terminal whether to run a model's own Python."""


def public_name(name: str) -> str:
    """What published files call a model: a hub id or a bundled name as it is, of a local folder its own name alone.

    Where a folder lies says who made it and on which machine, and helps nobody else to find it.
    """
    is_local = name.startswith(("/", "~", ".")) or name.count("/") > 1 or "\\" in name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_local else name


def model_location(name: str) -> str:
    """The folder of a bundled model, or `name` itself (a hub id or a path) for any other."""
    return str(BUNDLED_FOLDER / name) if name in BUNDLED_MODELS else name
