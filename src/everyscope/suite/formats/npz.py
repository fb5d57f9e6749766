"""Reading named arrays out of an npz file that anybody may have made: no pickles, and no more memory than the file is worth.

numpy's own reader allocates what a header claims before it looks at the file, unpacks bombs, and explains refusals by how to load
them unsafely.
"""

import math
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

import numpy as np

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import human_bytes, require_file, unreadable

NPZ_FILE = "params.npz"
"""The file of weights of Gemma Scope, and of our suites beside SAELens' pair."""
MAX_EXPANSION, ALWAYS_ALLOWED = 32, 1 << 26
"""Arrays may take this multiple of their file's bytes [1], or this many bytes where that is more [bytes]."""
SUFFIX = ".npy"
CHUNK_BYTES = 1 << 24
MAX_HEADER = 10_000
"""Characters of an array's header; one of five plain numbers and names has a hundred."""


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an npz file; DataError where it is none, DamagedData where it holds one name twice."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename.removesuffix(SUFFIX) for info in archive.infolist()]
    except Exception as error:  # zipfile raises half a dozen kinds for damaged directories, and more with each version
        raise unreadable(path, "an npz file", error) from error
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise DamagedData(f"{path}: holds the array {doubled[:100]!r} twice; download or publish it again")
    return names


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of these names, which the file must have, as float32.

    DataError, which names the file, where one is no array of floating-point numbers, needs a pickle, is damaged, or would take
    more memory than the file is worth.
    """
    budget = max(MAX_EXPANSION * path.stat().st_size, ALWAYS_ALLOWED)
    found: dict[str, np.ndarray] = {}
    for name in names:
        try:
            with zipfile.ZipFile(path) as archive:
                found[name], used = _read(archive, name, budget, lambda problem, name=name: _refused(path, name, problem))
                budget -= used
        except DataError:
            raise
        except Exception as error:  # of zipfile, its decompressors, and numpy's parser of headers: not a closed set
            raise unreadable(path, f"an npz file with the array {name!r}", error) from error
    return found


def _refused(path: Path, name: str, problem: str) -> DataError:
    return DataError(f"{path}: the array {name!r} {problem}")


def _read(archive: zipfile.ZipFile, name: str, budget: int, refused: Callable[[str], DataError]) -> tuple[np.ndarray, int]:
    """One array, and the memory that it took [bytes]."""
    names = archive.namelist()
    info = archive.getinfo(name + SUFFIX if name + SUFFIX in names else name)
    with archive.open(info) as file:
        shape, is_fortran, dtype = _header(file, refused)
        if dtype.kind != "f":
            raise refused(f"holds {dtype}, expected floating-point numbers; convert it to float32")
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > budget:
            raise refused(f"would take {human_bytes(num_bytes)}, far more than its file; it is no file of weights")
        data, done = bytearray(num_bytes), 0
        while done < num_bytes and (chunk := file.read(min(num_bytes - done, CHUNK_BYTES))):
            data[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done < num_bytes or file.read(1):  # the read behind the end also makes zipfile compare its checksum
            raise refused(f"has not the {num_bytes} bytes that its shape {shape} needs; download or publish it again")
    values = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.asarray(values, np.float32, order="C"), num_bytes


def _header(file: IO[bytes], refused: Callable[[str], DataError]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise refused(f"is of npy version {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file, max_header_size=MAX_HEADER)
    if dtype.hasobject:
        raise refused("holds Python objects, a pickle, which may run code and is never read; save plain numbers")
    if min(shape, default=0) < 0:
        raise refused(f"has shape {shape}")
    return shape, is_fortran, dtype
