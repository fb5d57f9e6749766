"""npz files that anybody may have made: refused in one line that names file and array, within bounded memory."""

import io
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from everyscope.base.errors import ConfigError, DataError
from everyscope.suite.formats.npz import array_names, read_arrays
from everyscope.suite.reader import load_sae

D_IN, D_SAE = 6, 16


def sae_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "threshold": (D_SAE,)}
    return {name: np.abs(random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def write(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


def changed(path: Path, **arrays) -> Path:
    """An SAE's npz with some arrays replaced, taken away (None) or added."""
    np.savez(path, **{name: array for name, array in (sae_arrays() | arrays).items() if array is not None})
    return path


def test_what_numpy_wrote_is_read_in_every_layout(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    forms = {"c": values, "f": np.asfortranarray(values), "big": values.astype(">f8"), "half": values.astype(np.float16)}
    np.savez(tmp_path / "a.npz", **forms)
    np.savez_compressed(tmp_path / "b.npz", **forms)
    for name in ("a.npz", "b.npz"):
        assert array_names(tmp_path / name) == list(forms)
        for array in read_arrays(tmp_path / name, list(forms)).values():
            assert array.dtype == np.float32
            assert np.array_equal(array, values)
    np.savez(tmp_path / "c.npz", scalar=np.float64(1.5))
    assert float(read_arrays(tmp_path / "c.npz", ["scalar"])["scalar"]) == 1.5


KINDS = {
    "int64": lambda a: a.astype(np.int64),
    "bool": lambda a: a > 0,
    "complex64": lambda a: a.astype(np.complex64),
    "<U": lambda a: a.astype(str),
    "datetime64": lambda a: a.astype("datetime64[s]"),
    "object|pickle": lambda a: a.astype(object),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_another_kind_are_refused_by_name(tmp_path, kind):
    path = changed(tmp_path / "params.npz", W_enc=KINDS[kind](sae_arrays()["W_enc"]))
    with pytest.raises(DataError, match=rf"params\.npz.*W_enc.*({kind})"):
        load_sae(path)


def test_nothing_in_an_npz_runs(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.write_text, (marker, "x")

    header = npy(np.zeros(1, object))
    body = header[: header.index(b"\n") + 1] + pickle.dumps(Evil())
    write(tmp_path / "params.npz", {name: npy(array) for name, array in sae_arrays().items()} | {"W_enc": body})
    with pytest.raises(DataError, match="never read"):
        load_sae(tmp_path / "params.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"b\.npz: is a pickle.*never read"):
        load_sae(tmp_path / "b.npz")
    assert not marker.exists()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """2 GiB of zeros in some MB; and headers that claim what no file holds."""
    zeros = npy(np.zeros(1, np.float32))
    claim = zeros.replace(b"(1,), }" + b" " * 20, b"(536870912,), }" + b" " * 12)
    assert claim != zeros
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("W_enc.npy", "w", force_zip64=True) as file:
            file.write(claim[: claim.index(b"\n") + 1])
            for _ in range(2048):
                file.write(bytes(1 << 20))
        for name, array in sae_arrays().items():
            if name != "W_enc":
                archive.writestr(f"{name}.npy", npy(array))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"params\.npz: the array 'W_enc' would take 2.0 GiB"):
        load_sae(tmp_path / "params.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # [kB]
    write(tmp_path / "short.npz", {"W_enc": claim})
    with pytest.raises(DataError, match="would take"):
        read_arrays(tmp_path / "short.npz", ["W_enc"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_enc": np.ones((D_IN, D_SAE), np.float32)}, "both W_enc and w_enc"),
        ({"threshold": np.full(D_SAE, -0.5, np.float32)}, "threshold has -0.5"),
        ({"W_enc": np.ones(D_IN, np.float32)}, r"W_enc has shape \(6,\)"),
        ({"W_enc": np.ones((), np.float32)}, r"W_enc has shape \(\)"),
        ({"W_enc": np.ones((1, D_IN, D_SAE), np.float32)}, r"shape \(1, 6, 16\)"),
        ({"W_enc": np.ones((0, 0), np.float32)}, r"shape \(0, 0\)"),
        ({"W_enc": np.ones((D_SAE, D_IN), np.float32)}, "transposed"),
        ({"b_dec": np.ones((1, D_IN), np.float32)}, r"b_dec has shape \(1, 6\)"),
        ({"b_dec": np.full(D_IN, np.nan, np.float32)}, "b_dec holds NaN"),
        ({"b_dec": None}, "no tensor named b_dec"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_files_name(tmp_path, changes, words):
    with pytest.raises(DataError, match=rf"params\.npz.*{words}"):
        load_sae(changed(tmp_path / "params.npz", **changes))


@pytest.mark.parametrize("name", ["scaling_factor", "ScalingFactor", "activation_norm", "scale", "skip"])
def test_factors_that_are_not_folded_are_refused_under_any_spelling(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"params\.npz: {name} is not . everywhere"):
        load_sae(changed(tmp_path / "params.npz", **{name: np.full(3, 0.5, np.float32)}))
    neutral = np.zeros(3) if name == "skip" else np.ones(3)
    assert load_sae(changed(tmp_path / "params.npz", **{name: neutral})).d_sae == D_SAE


def test_a_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy(np.ones(3)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("W_enc.npy", npy(np.ones(3)))
    with pytest.raises(DataError, match="twice"):
        array_names(tmp_path / "params.npz")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>"]
)
def test_other_files_named_npz_are_one_line(tmp_path, content):
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"params\.npz: (is|cannot be read)") as caught:
        load_sae(tmp_path)
    assert "unsafe" not in str(caught.value)
    assert "\n" not in str(caught.value)
