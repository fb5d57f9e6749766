"""saes.json: the order in which descriptions number SAEs. It is that in which a suite lists them, before there is a suite.

By site, width, L0 and name. A neighbour's `sae` is an index into this file, and so into the suite's.
"""

from pathlib import Path

from everyscope.base.errors import DataError
from everyscope.base.files import read_json, write_json
from everyscope.sites.names import Site, parse_folder

ORDER_FILE = "saes.json"


def write_order(folder: Path, saes: list[tuple[Site, str]]) -> None:
    """Write the SAEs (site, name in the run) in their order."""
    rows = [{"site": site.folder, "name": name} for site, name in saes]
    if not (folder / ORDER_FILE).exists() or read_json(folder / ORDER_FILE) != rows:
        write_json(folder / ORDER_FILE, rows)


def read_order(folder: Path) -> list[tuple[Site, str]]:
    """The SAEs that a folder of descriptions numbers, in order; DataError where it has no such file."""
    rows = read_json(folder / ORDER_FILE)
    try:
        return [(parse_folder(row["site"]), row["name"]) for row in rows]
    except (TypeError, KeyError) as error:
        raise DataError(f"{folder / ORDER_FILE}: is no list of sites and names; run `everyscope describe` again") from error
