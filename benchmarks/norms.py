"""How many rows of each site are above k times its median norm, and what share of the sum of squares they hold.

    python benchmarks/norms.py runs/mine/shards

Reads the statistics that a harvest keeps, no row. Limits fall on quarter octaves, so k is within a tenth of what the head says.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from everyscope.activations.shards.manifest import MANIFEST, TOKENS, read_manifest
from everyscope.activations.shards.reader import Shards

MULTIPLES = (3.0, 5.0, 8.0, 10.0)


def norms_table(root: Path) -> Table:
    """A line for each site below `root`: largest norm, and per multiple of the median rows per 100,000 and share of squares."""
    table = Table("site", "median", "largest / median", *(f"k = {multiple:g}" for multiple in MULTIPLES))
    for folder in sorted(path.parent for path in root.rglob(MANIFEST)):
        if read_manifest(folder).site == TOKENS:
            continue
        shards = Shards(folder)
        statistics = shards.statistics
        median = statistics.norms.median()
        largest = statistics.norms.largest[0][0] ** 0.5 / median
        cells = []
        for multiple in MULTIPLES:
            massive = statistics.massive(multiple)
            cells.append(f"{1e5 * massive.share_of_rows:,.0f}, {massive.share_of_squares:.1%}" if massive else "0")
        table.add_row(shards.site, f"{median:.3g}", f"{largest:.1f}", *cells)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="a folder that `everyscope harvest` wrote")
    Console(width=130).print(norms_table(parser.parse_args().shards))
