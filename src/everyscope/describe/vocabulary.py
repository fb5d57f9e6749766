"""The tokens of a description, once for the whole suite."""

from pathlib import Path
from typing import Any

import pyarrow

from everyscope.base.tables import write_table
from everyscope.text.pieces import special_tokens, token_pieces


def write_vocabulary(path: Path, tokenizer: Any) -> None:
    """vocabulary.parquet: token, its bytes, the same as text (with U+FFFD where they are none), and whether it is special."""
    pieces, special = token_pieces(tokenizer), special_tokens(tokenizer)
    table = pyarrow.table(
        {
            "token": pyarrow.array(range(len(pieces)), pyarrow.int32()),
            "piece": pyarrow.array(pieces, pyarrow.binary()),
            "text": pyarrow.array([piece.decode("utf-8", "replace") for piece in pieces], pyarrow.string()),
            "is_special": pyarrow.array([token in special for token in range(len(pieces))], pyarrow.bool_()),
        }
    )
    write_table(path, table, compression="zstd")
