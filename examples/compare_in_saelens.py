"""Load every SAE of a suite in SAELens and compare its reconstructions with ours. Runs where sae-lens is installed.

    python examples/compare_in_saelens.py runs/tiny/suite reconstructions.npz

docs/guides/saelens.md says how the two examples work together.
"""

# pyright: reportMissingImports=false

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE  # pyright: ignore[reportMissingImports]

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest activation of a site; rounding of float32 explains 1e-6."""


def main(suite: Path, reconstructions: Path) -> None:
    """Print the largest relative difference over all SAEs; exit with an error where it is above TOLERANCE."""
    arrays = np.load(reconstructions)
    names = sorted(name.removesuffix("/x") for name in arrays.files if name.endswith("/x"))
    worst = 0.0
    for name in names:
        sae = SAE.load_from_disk(str(suite / name))
        x, x_hat = torch.from_numpy(arrays[f"{name}/x"]), arrays[f"{name}/x_hat"]
        if sae.cfg.reshape_activations == "hook_z":  # SAELens takes heads apart: [tokens, heads, head_dim]
            x = x.reshape(len(x), 4, -1)
        theirs = sae(x).detach().numpy().reshape(x_hat.shape)
        worst = max(worst, float(np.abs(theirs - x_hat).max() / np.abs(arrays[f"{name}/x"]).max()))
    print(f"{len(names)} SAEs, largest relative difference {worst:.1e}")
    if worst > TOLERANCE:
        sys.exit(f"SAELens and everyscope disagree by more than {TOLERANCE}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
