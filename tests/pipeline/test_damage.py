"""Files of every kind, damaged in every way: each is refused in one line that names a file, or read as what it was.

Never a traceback, never another result without a word. Every run draws a sample; two thousand are made by
`pytest -m thorough tests/pipeline/test_damage.py`.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from browser.asking import ask
from browser.invented_suite import Shape, write_invented_suite
from invented_scores import SITES, add_sae, add_slices

from everyscope.base.errors import DataError, EveryscopeError
from everyscope.base.table_trial import Tried
from everyscope.base.tables import HELD, UNSEALED, _seal, check_table, read_table, write_table
from everyscope.base.tensors import opened_tensors, write_tensors
from everyscope.browse.app import Browser
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index
from everyscope.publish import pages
from everyscope.publish import run as publish
from everyscope.publish.config import PublishConfig
from everyscope.publish.slices import publish_slices, read_cost
from everyscope.publish.targets import find_targets
from everyscope.sae.config import SaeConfig
from everyscope.sae.files import read_sae
from everyscope.sae.folded import Sae
from everyscope.sae.normalisation import Normalisation
from everyscope.suite.reader import load_sae, load_suite
from everyscope.suite.verify import verify_suite
from everyscope.train.checkpoint import load_checkpoint, save_checkpoint
from everyscope.train.training_group import TrainingGroup

SAMPLE, ALL = 6, 110
"""Mutations of each kind of file in every run, and at night: two thousand in all."""
SAES = [SaeConfig(width=16, sparsity_coefficient=1e-3)]


@dataclass(frozen=True)
class Kind:
    """One kind of file, and what reads it."""

    path: Path
    read: Callable[[], Any]
    """Everything that becomes of the file, as a value that can be compared."""
    may_leave_out: bool = False
    """Whether its reader says that it is damaged and goes on without it, as pages do, or measures again."""


def tensors_of(sae: Sae) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in sae.tensors().values()]


def new_group() -> TrainingGroup:
    return TrainingGroup(SAES, 6, Normalisation(2.0, None), 20)


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishConfig]:
    """A little run with everything short of pictures, published."""
    root = tmp_path_factory.mktemp("damage")
    config = PublishConfig(
        trained=root / "train", scores=root / "scores", out=root / "suite", title="Test scope", model="some/model"
    )
    for width in (16, 32):
        add_sae(config, SITES[-1], f"w{width}_0.5", width, 0.5)
    add_slices(config, SITES[-1], "w16_0.5", "w32_0.5")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pages, "write_picture", lambda folder, picture, basis: None)
        patched.setattr(pages, "write_report", lambda out, evidence: [])
        patched.setattr(publish, "write_report", lambda out, evidence: [])
        publish.run(config)
        yield config


@pytest.fixture(scope="module")
def kinds(scope: PublishConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Every kind of file by name."""
    root = tmp_path_factory.mktemp("kinds")
    site, suite = SITES[-1].folder, load_suite(scope.out)
    folder, home = scope.trained / site / "w16_0.5", suite.find()[0].folder
    loose = Path(shutil.copytree(home, root / "loose"))
    save_checkpoint(root / "group.safetensors", new_group(), "run", log_bytes=11)
    write_tensors(root / "progress.safetensors", new_group().tensors(), {"progress": "{}"}, is_sealed=True)

    def checkpoint() -> Any:
        group = new_group()
        place = load_checkpoint(root / "group.safetensors", group, "run")
        return place, [tensor.numpy().tobytes() for tensor in group.tensors().values()]

    def progress() -> Any:
        with opened_tensors(root / "progress.safetensors") as file:
            return [(name, file.get_tensor(name).numpy().tobytes()) for name in sorted(file.keys())], file.metadata()

    def sources() -> Any:
        return [(source.metrics, source.headline, source.target_l0) for source in find_targets(scope)]

    def slices() -> Any:
        return publish_slices(scope.scores, root / "slices", {f"{site}/w{w}_0.5": str(w) for w in (16, 32)})

    def verified() -> Any:
        verify_suite(scope.out)
        return [record.as_json() for record in load_suite(scope.out).index.saes]

    def trained() -> Any:
        sae, record = read_sae(folder)
        return tensors_of(sae), record

    scores = scope.scores / site / "w16_0.5"
    found = {
        "checkpoint": Kind(root / "group.safetensors", checkpoint),
        "progress": Kind(root / "progress.safetensors", progress),
        "sae.safetensors": Kind(folder / "sae.safetensors", trained),
        "sae.json": Kind(folder / "sae.json", trained),
        "scores/metrics.json": Kind(scores / "metrics.json", sources),
        "scores/latents.parquet": Kind(
            scores / "latents.parquet", lambda: check_table(scores / "latents.parquet", "run it again")
        ),
        "scores/cost.json": Kind(scope.scores / "cost.json", lambda: read_cost(scope.scores)),
        "scores/splitting.json": Kind(scope.scores / "slices/splitting.json", slices),
        "params.npz": Kind(loose / "params.npz", lambda: tensors_of(load_sae(loose / "params.npz"))),
        "cfg.json": Kind(home / "cfg.json", lambda: tensors_of(load_sae(home))),
        "sae_weights.safetensors": Kind(home / "sae_weights.safetensors", lambda: tensors_of(load_sae(home))),
    }
    for name in ("suite.json", "cost.json", "README.md", "table.parquet"):
        found[f"suite/{name}"] = Kind(scope.out / name, verified)
    found["suite/metrics.json"] = Kind(home / "metrics.json", verified)
    return found


NAMES = [
    "checkpoint",
    "progress",
    "sae.safetensors",
    "sae.json",
    "scores/metrics.json",
    "scores/latents.parquet",
    "scores/cost.json",
    "scores/splitting.json",
    "params.npz",
    "cfg.json",
    "sae_weights.safetensors",
    "suite/suite.json",
    "suite/cost.json",
    "suite/README.md",
    "suite/table.parquet",
    "suite/metrics.json",
]
"""All kinds but those that pages are made of."""


def bytes_damaged(random_: random.Random, good: bytes) -> bytes:
    """Bits flipped, a stretch zeroed, cut out, doubled, swapped or put behind; cut short; or something else altogether."""
    place, other = sorted(random_.randrange(len(good)) for _ in range(2))
    length = 1 << random_.randrange(8)
    bad = bytearray(good)
    match random_.randrange(10):
        case 0 | 1 | 2:
            bad[place] ^= 1 << random_.randrange(8)
        case 3:
            bad[place : place + length] = bytes(len(bad[place : place + length]))
        case 4:
            del bad[place : place + length]
        case 5:
            bad[place:place] = bad[place : place + length]
        case 6:
            bad[place : place + length], bad[other : other + length] = bad[other : other + length], bad[place : place + length]
        case 7:
            bad += random_.randbytes(length)
        case 8:
            del bad[place:]
        case _:
            texts = (
                b"",
                b"<!doctype html><p>",
                b"version https://git-lfs.github.com/spec/v1\n",
                b"[" * 99_999,
                b"\x80\x04.",
                b"null",
            )
            bad = bytearray(random_.choice(texts))
    return bytes(bad)


VALUES: list[Any] = [
    None,
    0,
    -1,
    1.5,
    2**40,
    10**30,
    "",
    "x",
    "../../x",
    [],
    {},
    True,
    [None],
    1e308,
    "9" * 5000,
    "\ud800",
    "\x1b[2J",
]


def value_damaged(random_: random.Random, value: Any) -> Any:
    """One value in a JSON value, however deep, is another, or gone."""
    if isinstance(value, dict | list) and value and random_.random() < 0.9:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = random_.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if random_.random() < 0.1:
            del copy[key]
        else:
            copy[key] = value_damaged(random_, copy[key])
        return copy
    return random_.choice(VALUES)


def damage(random_: random.Random, path: Path, good: bytes) -> str:
    """Damage the file; says how."""
    path.unlink()
    way = random_.random()
    if way < 0.04:
        os.mkfifo(path)
        return "a pipe"
    if way < 0.08:
        path.symlink_to("/dev/zero")
        return "a link to /dev/zero"
    if way < 0.12:
        path.mkdir()
        return "a folder"
    if path.suffix == ".json" and way < 0.6:
        bad = json.dumps(value_damaged(random_, json.loads(good))).encode()
    else:
        bad = bytes_damaged(random_, good)
    path.write_bytes(bad)
    return repr(bad[:200])


def restore(path: Path, good: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(good)


def outcome(kind: Kind) -> tuple[str | None, Any]:
    """What the reader says in refusal, or what it reads. Any other exception is a traceback to a user, and ends the test."""
    try:
        return None, kind.read()
    except EveryscopeError as error:
        return str(error), None


def check(kind: Kind, count: int, seed: int) -> None:
    good, want, times = kind.path.read_bytes(), kind.read(), kind.path.stat()
    random_, num_refused = random.Random(seed), 0
    for number in range(count):
        how = damage(random_, kind.path, good)
        said, got = outcome(kind)
        restore(kind.path, good)
        os.utime(kind.path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if said is None:
            is_same = kind.may_leave_out or got == want
            assert is_same, (number, how)
        else:
            num_refused += 1
            assert "\n" not in said.strip(), (number, how)
            assert kind.path.name in said or str(kind.path.parent) in said, (number, how, said)
    assert kind.read() == want
    assert kind.may_leave_out or num_refused > count / 2


COUNTS = [SAMPLE, pytest.param(ALL, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_or_changes_nothing(kinds: dict[str, Kind], name: str, count: int):
    check(kinds[name], count, seed=NAMES.index(name))


PAGE_FILES = ("suite.json", "metrics.json", "latents.parquet", "explanations.parquet", "sequences.parquet", "splitting.json")


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", PAGE_FILES)
def test_pages_of_a_damaged_suite_are_pages(tmp_path: Path, name: str, count: int):
    """What is damaged is said and left out; every page that is left is whole."""
    shape = Shape(kinds=("resid_post",), layers=1, widths=(16, 32), l0s=(5.0,), num_sequences=8, context=32)
    suite = write_invented_suite(tmp_path / "suite", shape)
    path, number = next(suite.rglob(name)), 0

    def read() -> Any:
        nonlocal number
        number += 1
        preparation = Preparation(suite, tmp_path / f"cache_{number}")
        index: Index = preparation.run()
        app = Browser(preparation, None).app()
        folders = [f"/sae/{sae.folder}/" for sae in index.saes]
        addresses = ["/", "/comparisons", "/compare", "/search?q=a", *folders, *(f"{folder}3" for folder in folders)]
        answers = [ask(app, address) for address in addresses]
        assert {answer.status for answer in answers} <= {200, 404, 422}
        return [answer.body for answer in answers]

    check(Kind(path, read, may_leave_out=True), count, seed=PAGE_FILES.index(name))


@pytest.mark.parametrize("count", [30, pytest.param(2000, marks=pytest.mark.thorough)])
def test_a_hostile_table_that_passes_its_trial_is_read_here_too(kinds: dict[str, Kind], tmp_path: Path, count: int):
    """Sealed again after each mutation, so that nothing but Arrow stands between the bytes and us."""
    table = pyarrow.parquet.read_table(kinds["scores/latents.parquet"].path)
    random_, paths = random.Random(count), [tmp_path / f"{number}.parquet" for number in range(count)]
    for number, path in enumerate(paths):
        compression, version = ("none", "zstd")[number % 2], ("1.0", "2.0")[number // 2 % 2]
        write_table(path, table, compression=compression, data_page_version=version, use_dictionary=number % 3 == 0)
        good = path.read_bytes()
        held = HELD.search(good)
        bad = bytes_damaged(random_, good).replace(held.group(1), UNSEALED.encode())
        path.write_bytes(bad)
        if UNSEALED.encode() in bad:
            _seal(path)
    tried, num_read = Tried(paths, "again"), 0
    for path in paths:
        with suppress(DataError):
            tried.require(path)
            assert len(read_table(path, table.column_names, "again")) <= len(table)
            num_read += 1
    assert count / 50 < num_read < count / 2


def test_two_thousand_mutations_at_night():
    assert ALL * len(NAMES) + 40 * len(PAGE_FILES) >= 2000
