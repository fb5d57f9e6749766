import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from everyscope.activations.harvest import foreign, tables
from everyscope.activations.harvest.config import ImportConfig
from everyscope.activations.harvest.foreign import import_array
from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.verify import verify_shards
from everyscope.activations.stream.local import LocalSource
from everyscope.base.errors import ConfigError, DataError, NonFinite, ShapeMismatch, StorageError
from tests.unit.activations.harvest.conftest import tree

SEQUENCES, POSITIONS, D_IN = 90, 7, 5


def table(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2, 1, (SEQUENCES, POSITIONS, D_IN)).astype(np.float32)


def as_npy(path: Path, values: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), values)
    return path.with_suffix(".npy")


def as_half_npy(path: Path, values: np.ndarray) -> Path:
    return as_npy(path, values.astype(np.float16))


def as_foreign_order_npy(path: Path, values: np.ndarray) -> Path:
    return as_npy(path, np.asfortranarray(values.astype(">f8")))


def as_safetensors(path: Path, values: np.ndarray) -> Path:
    save_file({"activations": torch.from_numpy(values).bfloat16()}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_saelens(path: Path, values: np.ndarray) -> Path:
    """What SAELens' CacheActivationsRunner leaves: a dataset with a column named after the hook, and the tokens."""
    features = {
        "blocks.3.hook_mlp_out": datasets.Array2D(values.shape[1:], "float32"),
        "token_ids": datasets.Sequence(datasets.Value("int32"), length=values.shape[1]),
    }
    tokens = np.zeros(values.shape[:2], np.int32)
    columns = {"blocks.3.hook_mlp_out": values, "token_ids": tokens}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(path, num_shards=3)
    return path


Maker = Callable[[Path, np.ndarray], Path]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_BYTES", 4 * 11 * POSITIONS * D_IN)


@pytest.fixture
def bring(tmp_path) -> Callable[..., ImportConfig]:
    def config(source: Path, **fields) -> ImportConfig:
        return ImportConfig(**{"source": source, "site": "vision/block_7", "out": tmp_path / "out", "bucket_rows": 100} | fields)

    return config


@pytest.mark.parametrize("make", [as_npy, as_half_npy, as_foreign_order_npy, as_safetensors, as_saelens])
@pytest.mark.parametrize(("skip", "shuffle_bytes", "at_once"), [(0, 10**9, 256), (1, 500, 256), (1, 10**9, 2)])
def test_each_row_once_and_as_it_was(bring, tmp_path, make: Maker, skip, shuffle_bytes, at_once, monkeypatch):
    monkeypatch.setattr(foreign, "SHARDS_AT_ONCE", at_once)
    values = table()
    config = bring(make(tmp_path / "given", values), skip_positions=skip, shuffle_bytes=shuffle_bytes)
    result = import_array(config)
    shards = Shards(result.folder)
    count = SEQUENCES * (POSITIONS - skip)
    assert (shards.site, shards.num_rows, shards.d_in, shards.dtype) == ("vision/block_7", count, D_IN, "float32")
    sequence, position = (read(0, count).numpy() for read in (shards.sequence, shards.position))
    want = {(s, p) for s in range(SEQUENCES) for p in range(skip, POSITIONS)}
    assert set(zip(sequence.tolist(), position.tolist(), strict=True)) == want
    stored = torch.from_numpy(values[sequence, position])
    exact = {as_half_npy: torch.float16, as_safetensors: torch.bfloat16}.get(make, torch.float32)  # pyright: ignore[reportCallIssue]
    assert torch.equal(shards.rows(0, count), stored.to(exact).float())
    assert shards.statistics.count == count
    verify_shards(result.folder)
    assert LocalSource(result.folder).batch(0, 8).shape == (8, D_IN)
    assert abs(np.corrcoef(np.arange(count), sequence)[0, 1]) < 0.2  # 4.5 standard errors of a shuffled order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_memory_nor_passes_change_a_byte(bring, tmp_path, dtype, monkeypatch):
    source = as_npy(tmp_path / "given", table())
    import_array(bring(source, dtype=dtype))
    import_array(bring(source, dtype=dtype, shuffle_bytes=1, out=tmp_path / "little"))
    monkeypatch.setattr(foreign, "SHARDS_AT_ONCE", 1)
    import_array(bring(source, dtype=dtype, out=tmp_path / "passes"))
    assert tree(tmp_path / "out") == tree(tmp_path / "little") == tree(tmp_path / "passes")
    import_array(bring(source, dtype=dtype, seed=1, out=tmp_path / "other"))
    assert tree(tmp_path / "other") != tree(tmp_path / "out")


def test_rows_without_sequences_are_numbered(bring, tmp_path):
    values = table().reshape(-1, D_IN)
    result = import_array(bring(as_npy(tmp_path / "given", values), site="protein"))
    shards = Shards(result.folder)
    assert torch.equal(shards.rows(0, 630), torch.from_numpy(values[shards.sequence(0, 630).numpy()]))
    assert not shards.position(0, 630).any()


def test_it_does_nothing_twice_and_goes_on_where_it_was_interrupted(bring, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "SHARDS_AT_ONCE", 2)
    source = as_npy(tmp_path / "given", table())
    config = bring(source)
    import_array(bring(source, out=tmp_path / "undisturbed"))
    put, left = foreign.ActivationWriter.put, iter(range(25))

    def unlucky(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return put(*args, **kwargs)

    monkeypatch.setattr(foreign.ActivationWriter, "put", unlucky)
    with pytest.raises(KeyboardInterrupt):
        import_array(config)
    there = tree(config.out)
    assert "shard_00001.safetensors" in there
    assert "shard_00002.safetensors" not in there
    monkeypatch.setattr(foreign.ActivationWriter, "put", put)
    import_array(config)
    assert tree(config.out) == tree(tmp_path / "undisturbed")
    stamps = {path: path.stat().st_mtime_ns for path in config.out.iterdir()}
    import_array(config)
    assert {path: path.stat().st_mtime_ns for path in config.out.iterdir()} == stamps
    (config.out / "shard_00003.safetensors").unlink()
    import_array(config)
    assert tree(config.out) == tree(tmp_path / "undisturbed")


def test_a_folder_of_others_is_left_alone(bring, tmp_path):
    source = as_npy(tmp_path / "given", table())
    import_array(bring(source))
    before = tree(tmp_path / "out")
    for changes in ({"seed": 1}, {"site": "vision/block_8"}, {"skip_positions": 1}):
        with pytest.raises(ConfigError, match="holds other shards"):
            import_array(bring(source, **changes))
    np.save(source, table(seed=1))
    with pytest.raises(ConfigError, match="holds other shards"):
        import_array(bring(source))
    assert tree(tmp_path / "out") == before


def test_two_imports_do_not_share_a_folder(bring, tmp_path):
    config = bring(as_npy(tmp_path / "given", table()))
    with (
        foreign.writing(config.out, (0, 1), "", lambda has_company: None, lambda: None),
        pytest.raises(StorageError, match="another harvest is writing here"),
    ):
        import_array(config)


def test_not_a_number_is_named_by_sequence_and_position(bring, tmp_path):
    values = table()
    values[40, 3, 2] = np.nan
    with pytest.raises(NonFinite, match="vision/block_7, block 40, position 3"):
        import_array(bring(as_npy(tmp_path / "given", values)))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), (0, 3), (3, 0)])
def test_arrays_of_another_shape_are_refused(bring, tmp_path, shape):
    with pytest.raises(ShapeMismatch, match="expected \\[rows, d_in\\]"):
        import_array(bring(as_npy(tmp_path / "given", np.zeros(shape, np.float32))))


def test_what_is_no_table_is_refused_by_name(bring, tmp_path):
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}, {}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2), "n": torch.zeros(2, 2).int()}, tmp_path / "two.safetensors")
    (tmp_path / "empty").mkdir()
    cases = [
        (as_npy(tmp_path / "whole", np.zeros((3, 3), np.int64)), {}, DataError, "int64"),
        (pickled, {}, DataError, "pickled.npy"),
        (tmp_path / "text.npy", {}, DataError, "text.npy: no .npy array"),
        (tmp_path / "text.safetensors", {}, DataError, "text.safetensors: not readable"),
        (tmp_path / "two.safetensors", {}, ConfigError, r'3 tensors; set tensor to one of \["a", "b", "n"\]'),
        (tmp_path / "two.safetensors", {"tensor": "c"}, ConfigError, "no tensor 'c'"),
        (tmp_path / "two.safetensors", {"tensor": "n"}, DataError, "n is I32"),
        (tmp_path / "whole.npy", {"tensor": "a"}, ConfigError, "leave it out"),
        (tmp_path / "nowhere.npy", {}, DataError, "no such file"),
        (tmp_path / "empty", {}, DataError, "state.json"),
        (as_npy(tmp_path / "rows", np.zeros((3, 3), np.float32)), {"skip_positions": 1}, ShapeMismatch, "skip fewer"),
    ]
    for source, fields, error, message in cases:
        with pytest.raises(error, match=message):
            import_array(bring(source, **fields))
        assert not (tmp_path / "out").exists()
    import_array(bring(tmp_path / "two.safetensors", tensor="a"))


def test_caches_of_saelens_that_are_not_whole_are_refused(bring, tmp_path):
    cache = as_saelens(tmp_path / "given", table())
    state = json.loads((cache / "state.json").read_text())
    name = state["_data_files"][1]["filename"]
    data = (cache / name).read_bytes()
    (cache / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        import_array(bring(cache))
    (cache / name).write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=f"{name}: no Arrow stream"):
        import_array(bring(cache))
    (cache / name).write_bytes(data)
    with pytest.raises(ConfigError, match=r"no column 'blocks\.4"):
        import_array(bring(cache, tensor="blocks.4.hook_mlp_out"))
    with pytest.raises(ConfigError, match="no column 'token_ids'"):
        import_array(bring(cache, tensor="token_ids"))
    import_array(bring(cache, tensor="blocks.3.hook_mlp_out"))


def test_lists_of_several_lengths_are_refused(bring, tmp_path):
    ragged = [[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0]]]
    datasets.Dataset.from_dict({"hook": ragged}).save_to_disk(tmp_path / "ragged")
    with pytest.raises(ShapeMismatch, match="lengths"):
        import_array(bring(tmp_path / "ragged"))
