"""A graph's page as one file that opens without a server and a network: data, cards, style and scripts are inside."""

from typing import Any

from markupsafe import Markup

from everyscope.browse.links import Links, Nowhere
from everyscope.browse.pages import environment, render, static_files
from everyscope.browse.queries import Index
from everyscope.browse.views.circuit import (
    FOREIGN_EDGE_SHARE,
    FOREIGN_NODE_SHARE,
    card_of,
    circuit_data,
    circuit_foreign,
    circuit_view,
)
from everyscope.circuits.graph import Graph

SCRIPTS = ("theme.js", "circuit.js", "circuit_panels.js", "circuit_pins.js", "circuit_save.js")


def inlined(index: Index, links: Links, name: str, graph: Graph) -> dict[str, Any]:
    """The script's data with everything that it would ask the server for."""
    data = circuit_data(index, links, name, graph)
    folders = [coder.name for coder in graph.facts.coders]
    places = {(node["coder"], node["index"]) for node in data["nodes"] if node["kind"] == "latent"}
    cards = {f"{coder}_{latent}": card_of(index, index.find(folders[coder]), latent) for coder, latent in sorted(places)}
    foreign = circuit_foreign(index, name, graph, FOREIGN_NODE_SHARE, FOREIGN_EDGE_SHARE)
    return data | {"cards": cards, "foreign": None, "foreign_json": foreign}


def circuit_file(index: Index, name: str, graph: Graph) -> str:
    """The page as HTML."""
    links, files = Nowhere(), static_files()
    view = circuit_view(links, name, graph, inlined(index, links, name, graph))
    style = Markup(files["style.css"].decode())
    scripts = [Markup(files[script].decode()) for script in SCRIPTS]
    return render(environment(), "circuit_file", index, links, style=style, scripts=scripts, **view)
