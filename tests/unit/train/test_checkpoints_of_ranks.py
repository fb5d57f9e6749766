"""A checkpoint does not know how many ranks there are, and is whole or was never there. What is published knows it no more."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import read_json
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.files import TENSOR_FILE, read_sae, write_sae
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.presets import fast, fast_transcoder
from everyscope.sae.trainable import fold
from everyscope.train import assembly
from everyscope.train.checkpoint import (
    MANIFEST,
    find_checkpoint,
    folder_of_ranks,
    forget_checkpoint,
    load_checkpoint,
    opened,
    save_checkpoint,
)
from everyscope.train.training_group import TargetSide, TrainingGroup

D_IN, ROWS, STEPS = 10, 24, 8
RECIPE = SaePreset(learning_rate=1e-2, learning_rate_warmup_steps=2, bandwidth=0.1, initial_threshold=0.4)
SAES = (
    SaeConfig(width=37, sparsity_coefficient=0.1, preset=RECIPE),
    SaeConfig(width=24, target_l0=3, preset=fast(D_IN)),
)
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)]


TRANSCODERS = (
    SaeConfig(width=37, sparsity_coefficient=0.1, preset=RECIPE, skip=True),
    SaeConfig(width=24, target_l0=3, preset=fast_transcoder(D_IN)),
)
TARGET = TargetSide(7, Normalisation(2.0, np.arange(7.0)))


def new_group(collective: Collective = ALONE, engine: str = "pairs", *, are_transcoders: bool = False) -> TrainingGroup:
    side, saes = (TARGET, TRANSCODERS) if are_transcoders else (None, SAES)
    return TrainingGroup(saes, D_IN, Normalisation(3.0), STEPS, "cpu", engine, collective, side)


def step(group: TrainingGroup) -> None:
    mesh, generator = group.collective.mesh, torch.Generator().manual_seed(group.num_steps_done)
    x, y = torch.randn(ROWS, D_IN, generator=generator), torch.randn(ROWS, TARGET.d_out, generator=generator)
    group.step(*(side.chunk(mesh.replicas)[mesh.replica].contiguous() for side in ((x,) if group.target is None else (x, y))))


def write(in_threads, path: Path, shards: int, replicas: int, steps: int) -> list[TrainingGroup]:
    """Train so many steps on so many ranks, and save; the ranks' training groups."""

    def work(collective: Collective) -> TrainingGroup:
        group = new_group(collective)
        for _ in range(steps):
            step(group)
        save_checkpoint(path, group, "run", 11 if collective.mesh.rank == 0 else 0)
        return group

    return in_threads(work, shards, replicas)


def whole(groups: list[TrainingGroup]) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in groups[0].tensors().items():
        axis, _ = groups[0].latents_of(name)
        parts = [group.tensors()[name] for group in groups[: groups[0].collective.mesh.shards]]
        state[name] = tensor if axis is None else torch.cat(parts, axis)
    return state


@pytest.mark.parametrize("written", MESHES)
@pytest.mark.parametrize("read", MESHES)
def test_what_some_ranks_wrote_any_number_reads_to_the_bit(in_threads, tmp_path, written, read):
    path = tmp_path / "group.safetensors"
    want = whole(write(in_threads, path, *written, steps=3))
    assert path.exists() == (written == (1, 1))

    def work(collective: Collective) -> TrainingGroup:
        group = new_group(collective)
        place = load_checkpoint(path, group, "run")
        assert (place.num_steps_done, place.log_bytes, group.num_steps_done) == (3, 11, 3)
        return group

    groups = in_threads(work, *read)
    got = whole(groups)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    for group in groups:
        twin = groups[group.collective.mesh.shard]
        assert all(torch.equal(tensor, twin.tensors()[name]) for name, tensor in group.tensors().items())


def test_going_on_is_going_through(in_threads, tmp_path):
    """The same ranks come to the same bits, stopped or not."""
    path = tmp_path / "group.safetensors"
    want = whole(write(in_threads, path, 2, 2, steps=6))
    write(in_threads, path, 2, 2, steps=2)

    def work(collective: Collective) -> TrainingGroup:
        group = new_group(collective)
        load_checkpoint(path, group, "run")
        while group.num_steps_done < 6:
            step(group)
        return group

    got = whole(in_threads(work, 2, 2))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_set_half_written_is_not_used_and_the_one_before_stands(in_threads, tmp_path, monkeypatch):
    path, folder = tmp_path / "group.safetensors", folder_of_ranks(tmp_path / "group.safetensors")
    want = whole(write(in_threads, path, 2, 1, steps=2))
    files = {file.name for file in folder.iterdir()}

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("everyscope.train.checkpoint.write_sealed", killed)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            write(in_threads, path, 2, 1, steps=4)
    assert {file.name for file in folder.iterdir()} > files, "the new files are there, and no manifest names them"
    kept = find_checkpoint(path)
    assert kept is not None
    assert kept.place.num_steps_done == 2
    group = new_group()
    load_checkpoint(path, group, "run")
    assert all(torch.equal(group.tensors()[name], tensor) for name, tensor in want.items())
    write(in_threads, path, 2, 1, steps=5)
    assert {file.name for file in folder.iterdir()} == {MANIFEST, *read_json(folder / MANIFEST)["files"]}


def test_of_two_forms_the_one_of_more_steps_counts_and_saving_takes_the_other_away(in_threads, tmp_path):
    path = tmp_path / "group.safetensors"
    write(in_threads, path, 2, 1, steps=4)
    shutil.copytree(folder_of_ranks(path), tmp_path / "kept")
    group = new_group()
    step(group)
    save_checkpoint(path, group, "run", 0)
    assert not folder_of_ranks(path).exists()
    shutil.move(tmp_path / "kept", folder_of_ranks(path))  # as if a kill had come between writing and taking away
    assert load_checkpoint(path, new_group(), "run").num_steps_done == 4
    write(in_threads, path, 2, 1, steps=5)
    assert not path.exists()
    with pytest.raises(DataError, match="another run"):
        load_checkpoint(path, new_group(), "another run")
    forget_checkpoint(path)
    assert list(tmp_path.iterdir()) == []
    assert load_checkpoint(path, new_group(), "run").num_steps_done == 0


@pytest.mark.parametrize("spoil", ["cut", "gone"])
def test_a_damaged_set_is_refused_by_name(in_threads, tmp_path, spoil):
    path = tmp_path / "group.safetensors"
    write(in_threads, path, 2, 1, steps=1)
    part = folder_of_ranks(path) / read_json(folder_of_ranks(path) / MANIFEST)["files"][1]
    if spoil == "cut":
        part.write_bytes(part.read_bytes()[:-7])
    else:
        part.unlink()
    with pytest.raises(DamagedData, match=r"shard_1_of_2\.safetensors.*run the same command again"):
        load_checkpoint(path, new_group(), "run")


@pytest.mark.parametrize(("shards", "replicas"), MESHES[1:])
@pytest.mark.parametrize("numbers", [10, 70, 10**6])
@pytest.mark.parametrize("are_transcoders", [False, True])
def test_what_is_published_is_the_same_bytes_for_any_number_of_ranks(
    in_threads, tmp_path, monkeypatch, shards, replicas, numbers, are_transcoders
):
    """Given the same trained bits; assembled from ranges of one latent, of seven, and of all."""
    monkeypatch.setattr(assembly, "RANGE_NUMBERS", numbers)
    path, trained = tmp_path / "group.safetensors", new_group(are_transcoders=are_transcoders)
    target = trained.target_normalisation
    for _ in range(4):
        step(trained)
    save_checkpoint(path, trained, "run", 0)

    def work(collective: Collective) -> None:
        group = new_group(collective, are_transcoders=are_transcoders)
        load_checkpoint(path, group, "run")
        save_checkpoint(tmp_path / "shared.safetensors", group, "run", 0)

    in_threads(work, shards, replicas)
    kept = find_checkpoint(tmp_path / "shared.safetensors")
    assert kept is not None
    assert len(kept.files) == shards
    with opened(kept.files) as parts:
        for number, config in enumerate(TRANSCODERS if are_transcoders else SAES):
            together, record = tmp_path / f"together_{number}", {"width": config.width}
            if are_transcoders:
                record |= {"site": "transcoder", "layer": 1, "reads": "mlp_in/layer_1"}
            assembly.save_assembled(together, parts, number, config, Normalisation(3.0), record, target)
            write_sae(tmp_path / f"alone_{number}", fold(trained.saes[number], Normalisation(3.0), target), record)
            for name in (TENSOR_FILE, "sae.json"):
                ours, theirs = ((tmp_path / f"{kind}_{number}" / name).read_bytes() for kind in ("together", "alone"))
                assert ours == theirs
            assert read_sae(tmp_path / f"together_{number}")[0].d_sae == config.width
