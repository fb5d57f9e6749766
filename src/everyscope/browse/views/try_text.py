"""A text tried on one latent: every token shaded by how strongly it fires there, and marked in the latent's histogram."""

from typing import Any

from everyscope.browse.links import Links
from everyscope.browse.live import Asking, SaeQuestion
from everyscope.browse.pieces import Piece
from everyscope.browse.queries import Index, SaeFacts
from everyscope.browse.views.examples import shaded
from everyscope.browse.views.fields import Query, read_text


def tried_view(index: Index, links: Links, live: Asking, sae: SaeFacts, latent: int, query: Query) -> dict[str, Any] | None:
    """The text of the form with its activations; None where there is none. Waits for the model."""
    text = read_text(query, "text")
    if not text or live.state == "absent":
        return None
    reading = live.read(text, [SaeQuestion(sae.folder, follow=(latent,))])
    values = reading.by_sae[0].followed[latent]
    highest, _ = index.scales(sae)
    top = float(highest[latent]) or max(values) or 1.0
    pieces = [Piece(one.token, one.piece, one.is_special) for one in reading.tokens]
    return {
        "text": text,
        "html": shaded(pieces, 0, dict(enumerate(values)), top),
        "firings": [value for value in values if value > 0],
        "peak": max(values, default=0.0),
    }
