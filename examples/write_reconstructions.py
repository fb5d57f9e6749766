"""Write activations and our reconstructions of them, for another library to be compared with.

    python examples/write_reconstructions.py runs/tiny/suite reconstructions.npz

docs/guides/saelens.md says how the two examples work together.
"""

import sys
from pathlib import Path

import numpy as np

from everyscope import capture, load_language_model, load_suite

TEXT = "def first(items):\n    for item in items:\n        return item\n    raise ValueError('no items')\n"


def main(suite_folder: Path, out: Path) -> None:
    """For every SAE of the suite: `<folder>/x` [tokens, d_in] and `<folder>/x_hat`, of one snippet of Python."""
    suite = load_suite(suite_folder)
    activations = capture(load_language_model(suite.index.model), {entry.site for entry in suite}, TEXT)
    arrays = {}
    for entry in suite:
        x = activations[entry.site][0, 1:]
        name = entry.folder.relative_to(suite_folder).as_posix()
        arrays |= {f"{name}/x": x.numpy(), f"{name}/x_hat": entry.sae()(x).numpy()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
