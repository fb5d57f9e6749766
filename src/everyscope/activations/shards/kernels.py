"""The writer's one pass over activations, compiled for this CPU by numba: a row is read once, while it is in the cache it is
put to its place in the shard, and counted in float64 as it is stored.

Rows are named by `taken` in the source and by `places` in `out`, both within bounds (the caller checks; kernels do not).
`total` [d_in] and `norms` [n] are float64; NaN and infinity come out in `norms`. They leave the interpreter's lock to others.
"""

import numba
import numpy as np

OPTIONS = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
compiled = numba.njit(**OPTIONS)
inlined = numba.njit(**OPTIONS, forceinline=True)
HALF_BIT, HIGH = np.uint32(0x7FFF), np.uint32(16)


@inlined
def _counted(row: np.ndarray, total: np.ndarray) -> float:
    norm = 0.0
    for column in range(len(row)):
        wide = np.float64(row[column])
        norm += wide * wide
        total[column] += wide
    return norm


@compiled
def place_float32(
    rows: np.ndarray, taken: np.ndarray, places: np.ndarray, out: np.ndarray, total: np.ndarray, norms: np.ndarray
) -> None:
    """float32 rows [m, d_in] to float32 `out` [rows, d_in]."""
    for index in range(len(taken)):
        row, target = rows[taken[index]], out[places[index]]
        for column in range(len(row)):
            target[column] = row[column]
        norms[index] = _counted(row, total)


@compiled
def place_bfloat16(
    rows: np.ndarray, taken: np.ndarray, places: np.ndarray, out: np.ndarray, total: np.ndarray, norms: np.ndarray
) -> None:
    """bfloat16 rows, as uint16 [m, d_in], to `out` of the same kind."""
    bits = np.empty(rows.shape[1], np.uint32)
    wide = bits.view(np.float32)
    for index in range(len(taken)):
        row, target = rows[taken[index]], out[places[index]]
        for column in range(len(row)):
            target[column] = row[column]
            bits[column] = np.uint32(row[column]) << HIGH
        norms[index] = _counted(wide, total)


@compiled
def round_and_place(
    rows: np.ndarray, taken: np.ndarray, places: np.ndarray, out: np.ndarray, total: np.ndarray, norms: np.ndarray
) -> None:
    """float32 rows, as uint32 [m, d_in], rounded to the nearest bfloat16 (ties to even) in `out`, uint16 [rows, d_in]."""
    bits = np.empty(rows.shape[1], np.uint32)
    wide = bits.view(np.float32)
    for index in range(len(taken)):
        row, target = rows[taken[index]], out[places[index]]
        is_finite = True
        for column in range(len(row)):
            number = row[column]
            # Rounding could carry a NaN's bits over into those of a zero, so it is noticed before.
            is_finite &= (number & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
            rounded = (number + HALF_BIT + ((number >> HIGH) & np.uint32(1))) >> HIGH
            target[column] = np.uint16(rounded)
            bits[column] = rounded << HIGH
        norms[index] = _counted(wide, total) if is_finite else np.nan
