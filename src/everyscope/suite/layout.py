"""Where things lie in a published suite. Torch-free."""

from pathlib import Path

from everyscope.base.errors import ConfigError, DataError
from everyscope.sae.saelens import CONFIG_FILE, WEIGHTS_FILE
from everyscope.sites.names import Site
from everyscope.suite.formats.npz import NPZ_FILE

INDEX_FILE, CARD_FILE, REPORT_FILE = "suite.json", "README.md", "report/index.html"
TABLE_FILE, COST_FILE = "table.parquet", "cost.json"
SLICES_FOLDER, SAEBENCH_FOLDER, TEXT_FOLDER = "slices", "saebench/core", "text"
METRICS_FILE, LATENTS_FILE, EXPLANATIONS_FILE = "metrics.json", "latents.parquet", "explanations.parquet"
SAE_FILES = (NPZ_FILE, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, LATENTS_FILE, EXPLANATIONS_FILE)
"""What lies in the folder of one SAE; explanations only where they were made."""


def suite_folder(path: Path) -> Path:
    """The suite in `path`, which is its folder or that of its run; ConfigError or DataError where there is none."""
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; give the folder of a suite or of its run, as runs/tiny")
    for folder in (path, path / "suite"):
        if (folder / INDEX_FILE).is_file():
            return folder
    raise DataError(f"{path}: holds no {INDEX_FILE}, so it is no suite; give a suite's folder, or publish the run first")


def width_label(width: int) -> str:
    """`width` as Gemma Scope's folders write it: powers of two in thousands, cut off (1k, 16k, 131k, 1m), others in digits."""
    if width < 2**10 or width & (width - 1):
        return str(width)
    return f"{width // 10**6}m" if width >= 10**6 else f"{width // 10**3}k"


def sae_folder(site: Site, width: int, l0: float, *, has_skip: bool = False) -> str:
    """The folder of an SAE below its suite, as in resid_post/layer_3/width_16k/average_l0_71; l0 [latents] is rounded.

    Of a transcoder with a skip, as in transcoder/layer_3/width_16k/average_l0_71_skip.
    """
    return f"{site.folder}/width_{width_label(width)}/average_l0_{round(l0)}{'_skip' if has_skip else ''}"


def sae_folders(suite: Path) -> list[Path]:
    """Every folder below `suite` that has the name of an SAE's folder, indexed or not, in order of name."""
    return sorted(path for path in suite.glob("*/layer_*/width_*/average_l0_*") if path.is_dir())
