"""The columns of latents.parquet, their types, and nested columns made from flat arrays.

Values for people's eyes (logits, cosines, quantiles) are rounded to a few significant bits, for random bits do not compress, and
they would be most of the file. Counts are exact, and so are the means and maxima.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow
from jaxtyping import Bool, Float, Int, Shaped

from everyscope.describe.kernels import EMPTY
from everyscope.suite.latents import SCHEMA

SURROUNDING_COLUMNS = ("held_out_firings", "held_out_frequency", "neighbours")
"""Those that other SAEs and the evaluation decide; the rest is this SAE's own."""
KEPT_BITS = 11
"""Significant bits that rounded values keep: three decimal digits [bits]."""


def rounded(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """`values` as float32 with KEPT_BITS significant bits, to nearest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    dropped = 24 - KEPT_BITS
    half = np.uint32(1 << (dropped - 1))
    kept = (bits + half) & np.uint32(0xFFFFFFFF ^ ((1 << dropped) - 1))
    return np.where(np.isfinite(values), kept.view(np.float32), np.asarray(values, np.float32))


def lists(name: str, values: Shaped[np.ndarray, "latents k"], is_there: Bool[np.ndarray, " latents"]) -> pyarrow.Array:
    """A column of lists of equal length, empty for latents that are not there; NaN becomes null."""
    column = SCHEMA.field(name).type
    flat = values[is_there].ravel()
    mask = np.isnan(flat) if np.issubdtype(flat.dtype, np.floating) else None
    offsets = np.concatenate([[0], np.cumsum(is_there * values.shape[1])])
    items = pyarrow.array(flat, column.value_type, mask=mask)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), items, type=column)


def structs(name: str, counts: Int[np.ndarray, " latents"], fields: Mapping[str, np.ndarray | pyarrow.Array]) -> pyarrow.Array:
    """A column of lists of structs, from the flat arrays of its fields and how many entries each latent has."""
    column = SCHEMA.field(name).type
    arrays = [_as_array(fields[field.name], field.type) for field in column.value_type]
    entries = pyarrow.StructArray.from_arrays(arrays, fields=list(column.value_type))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), entries, type=column)


def _as_array(values: np.ndarray | pyarrow.Array, kind: pyarrow.DataType) -> pyarrow.Array:
    return values if isinstance(values, pyarrow.Array) else pyarrow.array(values, kind)


def ranked(name: str, keys: Int[np.ndarray, "latents k"], **fields: Shaped[np.ndarray, "latents k"]) -> pyarrow.Array:
    """A column of lists of structs from tables of equal rows; entries without a key (EMPTY) are left out.

    `keys` fill the struct's only field that is not named in `fields`.
    """
    (key,) = [field.name for field in SCHEMA.field(name).type.value_type if field.name not in fields]
    is_there = keys != EMPTY
    flat = {key: keys[is_there], **{field: values[is_there] for field, values in fields.items()}}
    return structs(name, is_there.sum(1), flat)


def numbers(name: str, values: Shaped[np.ndarray, " latents"], is_there: Bool[np.ndarray, " latents"]) -> pyarrow.Array:
    """A column of numbers, null for latents that are not there and for NaN."""
    missing = ~is_there | (np.isnan(values) if np.issubdtype(values.dtype, np.floating) else False)
    return pyarrow.array(values, mask=missing).cast(SCHEMA.field(name).type)
