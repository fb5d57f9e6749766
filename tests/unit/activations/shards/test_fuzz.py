"""Files that are not what was written, in a thousand ways: each is refused by name, and none of its bytes is ever returned."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from everyscope.activations.shards.manifest import IDENTITY
from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.verify import verify_shards
from everyscope.base.errors import DataError
from tests.unit.activations.shards.conftest import Written, write_site

NUM_MUTATIONS = int(os.environ.get("EVERYSCOPE_MUTATIONS", "1000"))
Mutation = Callable[[random.Random, bytes, list[bytes]], bytes]
"""Chance, a file's bytes, and those of files of its kind, to other bytes."""


def flip_a_bit(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def cut_off(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[: chance.randrange(len(data))]


def lengthen(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 50))


def put_in(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]


def swap_stretches(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    size = chance.randrange(1, len(data) // 4)
    first = chance.randrange(0, len(data) // 2 - size)
    second = chance.randrange(len(data) // 2, len(data) - size)
    return (
        data[:first]
        + data[second : second + size]
        + data[first + size : second]
        + data[first : first + size]
        + data[second + size :]
    )


def clear(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    size = chance.randrange(1, len(data))
    at = chance.randrange(len(data) - size + 1)
    return data[:at] + bytes(size) + data[at + size :]


def take_another(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return chance.choice(others)


def splice_another(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = chance.choice(others)
    at = chance.randrange(min(len(data), len(other)))
    return data[:at] + other[at:]


def swap_lines(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    lines = data.split(b"\n")
    first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def change_a_digit(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
    at = chance.choice(digits)
    return data[:at] + str(chance.randrange(10)).encode() + data[at + 1 :]


ANY = (flip_a_bit, cut_off, lengthen, put_in, swap_stretches, clear, take_another, splice_another)
MUTATIONS: dict[str, tuple[Mutation, ...]] = {".safetensors": ANY, ".json": (*ANY, swap_lines, change_a_digit)}


@dataclass(frozen=True)
class Lab:
    """A whole folder, a copy to spoil, and foreign files of each kind."""

    made: Written
    spoiled: Path
    foreign: dict[str, list[bytes]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    root = tmp_path_factory.mktemp("fuzz")
    made = write_site(root / "whole", "bfloat16", sizes=(37, 64, 37))
    strangers = [
        write_site(root / "a", "float32", sizes=(37, 64, 37)),
        write_site(root / "b", "bfloat16", sizes=(37, 64, 37), d_in=7),
        write_site(root / "c", "bfloat16", sizes=(64, 37, 37)),
    ]
    folders = [stranger.folder for stranger in strangers]
    foreign = {
        path.name: [*((folder / path.name).read_bytes() for folder in folders), *(other.read_bytes() for other in alike(path))]
        for path in made.folder.iterdir()
    }
    return Lab(made, shutil.copytree(made.folder, root / "spoiled"), foreign)


def alike(path: Path) -> list[Path]:
    """The other files of the folder that could be mistaken for this one."""
    return [other for other in sorted(path.parent.glob(f"shard_*{path.suffix}")) if other != path and path.name[0] == "s"]


def is_the_same(name: str, data: bytes, mutated: bytes) -> bool:
    """Whether a file says what it said before: byte by byte, save in a manifest, which is JSON and need not name itself."""
    if name != "manifest.json" or data == mutated:
        return data == mutated
    try:
        value, other = json.loads(data), json.loads(mutated)
    except ValueError:
        return False
    if not isinstance(other, dict) or other.get(IDENTITY, value[IDENTITY]) != value[IDENTITY]:
        return False
    other[IDENTITY] = value[IDENTITY]
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


def read_all(folder: Path) -> tuple[torch.Tensor, ...]:
    shards = Shards(folder)
    return tuple(read(0, shards.num_rows) for read in (shards.rows, shards.sequence, shards.position))


def test_every_mutation_is_refused_by_name_and_none_is_returned(lab: Lab):
    chance, want = random.Random(0), (lab.made.rows, lab.made.sequence, lab.made.position)
    names = sorted(path.name for path in lab.made.folder.iterdir() if path.name != "statistics.json")
    refused, alike = 0, 0
    for number in range(NUM_MUTATIONS):
        name = names[number % len(names)]
        mutate = chance.choice(MUTATIONS[Path(name).suffix])
        data = (lab.made.folder / name).read_bytes()
        mutated = mutate(chance, data, lab.foreign[name])
        (lab.spoiled / name).write_bytes(mutated)
        what = f"mutation {number}: {mutate.__name__} of {name}"
        try:
            if is_the_same(name, data, mutated):
                alike += 1
                assert all(map(torch.equal, read_all(lab.spoiled), want)), what
            else:
                with pytest.raises(DataError) as refusal:
                    read_all(lab.spoiled)
                shard = name.replace(".json", "") if name.startswith("shard") else name
                assert shard in str(refusal.value), f"{what}: {refusal.value}"
                if number % 3 == 0:  # it draws a progress bar each time
                    with pytest.raises(DataError) as refusal:
                        verify_shards(lab.spoiled, workers=1)
                    assert shard in str(refusal.value), f"{what}: {refusal.value}"
                refused += 1
        except BaseException as error:
            error.add_note(what)
            raise
        finally:
            (lab.spoiled / name).write_bytes(data)
    assert refused > 0.9 * NUM_MUTATIONS
    assert refused + alike == NUM_MUTATIONS
    assert all(map(torch.equal, read_all(lab.spoiled), want))


@pytest.mark.parametrize("endings", [[".safetensors"], [".json"], [".safetensors", ".json"]])
def test_shards_in_another_order_are_refused(lab: Lab, endings: list[str]):
    pairs = [tuple((lab.spoiled / f"shard_0000{index}").with_suffix(ending) for index in (0, 2)) for ending in endings]
    for first, last in pairs:
        swap(first, last)
    with pytest.raises(DataError, match="shard_00000"):
        read_all(lab.spoiled)
    for first, last in pairs:
        swap(first, last)
    read_all(lab.spoiled)


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def test_statistics_are_those_of_the_shards_whatever_their_file_says(lab: Lab):
    chance, path = random.Random(1), lab.spoiled / "statistics.json"
    data, want = path.read_bytes(), Shards(lab.made.folder).statistics.record().as_json()
    for number in range(NUM_MUTATIONS // 10):
        mutated = chance.choice(MUTATIONS[".json"])(chance, data, lab.foreign[path.name])
        path.write_bytes(mutated)
        assert Shards(lab.spoiled).statistics.record().as_json() == want, number
        if mutated != data:
            with pytest.raises(DataError, match="statistics"):
                verify_shards(lab.spoiled, workers=1)
    path.unlink()
    assert Shards(lab.spoiled).statistics.record().as_json() == want
    path.write_bytes(data)
