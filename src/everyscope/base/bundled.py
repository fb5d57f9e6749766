"""The models that come with the package: their names and where they lie."""

from pathlib import Path

BUNDLED_FOLDER = Path(__file__).parent / "bundled_models"
BUNDLED_MODELS = ("tiny", "tiny-it")
"""`tiny`: Gemma-2 architecture, trained from scratch on the Python standard library; `tiny-it`: its instruction-tuned sibling."""

NO_CODE: dict[str, bool] = {"trust_remote_code": False}
"""For every `from_pretrained`: without it transformers asks on the terminal whether to run a model's own Python."""


def model_location(name: str) -> str:
    """The folder of a bundled model, or `name` itself (a hub id or a path) for any other."""
    return str(BUNDLED_FOLDER / name) if name in BUNDLED_MODELS else name
