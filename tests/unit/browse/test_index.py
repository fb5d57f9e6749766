"""The index says what the Parquet says, is whole or absent, and is made anew when the suite changes."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from browser.asking import ask
from browser.invented_suite import Shape, write_invented_suite

from everyscope.base.errors import ConfigError, DataError, StorageError
from everyscope.base.files import read_sealed, write_sealed
from everyscope.base.tables import write_table
from everyscope.browse import cache as cache_module
from everyscope.browse import preparation as preparation_module
from everyscope.browse.app import Browser
from everyscope.browse.parts import TEXT
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index, finite
from everyscope.browse.search import SearchRequest, by_label, by_number, by_token, jump
from everyscope.browse.table_page import TableRequest, find_tokens, latent_page, words_query
from everyscope.browse.tables import SORTABLE
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.records import SaeRecord

pytestmark = pytest.mark.usefixtures("forked_interpreters")

TINY = Shape(kinds=("resid_post",), layers=1, widths=(40,), l0s=(5.0,), num_sequences=8, context=32)
PAIR = Shape(kinds=("resid_post",), layers=1, widths=(40, 50), l0s=(5.0,), num_sequences=8, context=32)


def published(suite: Path, folder: str) -> list[dict]:
    return finite(pyarrow.parquet.read_table(suite / folder / "latents.parquet").to_pylist())


def built(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.sqlite*"))


def test_details_are_the_published_rows(index: Index, suite: Path):
    for sae in index.saes[::3]:
        rows = published(suite, sae.folder)
        assert [index.details(sae, latent) for latent in range(sae.width)] == rows
        assert sae.num_alive == sum(row["firings"] > 0 for row in rows)
    assert index.details(index.saes[0], -1) is None
    assert index.details(index.saes[0], index.saes[0].width) is None


def test_names_that_are_not_in_the_suite_find_nothing(index: Index):
    for name in ("", "..", "../..", "/etc/passwd", "resid_post/layer_0/width_64/average_l0_5/..", "resid_post\x00"):
        assert index.find(name) is None


@pytest.mark.parametrize("sort", SORTABLE)
@pytest.mark.parametrize("is_descending", [True, False])
def test_pages_are_the_whole_table_in_order(index: Index, sort: str, is_descending: bool):
    sae = index.saes[-1]
    rows, total = [], None
    for number in range(1, 9):
        page = latent_page(index, sae, TableRequest(sort=sort, is_descending=is_descending, shown="all", page=number))
        rows += page.rows
        total = page.total
    assert total == len(rows) == sae.width
    assert sorted(row["latent"] for row in rows) == list(range(sae.width))
    known = [row[sort] for row in rows if row[sort] is not None]
    assert known == sorted(known, reverse=is_descending)
    assert all(row[sort] is None for row in rows[len(known) :])


def test_filters_agree_with_a_look_at_every_row(index: Index, suite: Path):
    sae = index.saes[-1]
    rows = published(suite, sae.folder)
    labels = pyarrow.parquet.read_table(suite / sae.folder / "explanations.parquet").to_pylist()
    labelled = {row["latent"] for row in labels if row["kind"] not in UNLABELLED}
    assert 0 < len(labelled) == sae.num_labels < len({row["latent"] for row in labels})
    want = {
        "labelled": lambda row: row["latent"] in labelled,
        "alive": lambda row: row["firings"],
        "dead": lambda row: not row["firings"],
        "dense": lambda row: row["frequency"] > 0.1,
    }
    for shown, keeps in want.items():
        page = latent_page(index, sae, TableRequest(shown=shown))
        assert page.total == sum(bool(keeps(row)) for row in rows)
    typed = "return"
    tokens = {piece.token for piece in find_tokens(index, typed)}
    assert len(tokens) == 2  # with and without a space
    found = latent_page(index, sae, TableRequest(token=typed, shown="all"))
    assert {row["latent"] for row in found.rows} == {
        row["latent"] for row in rows if tokens & {item["token"] for item in row["tokens"] or []}
    }
    found = latent_page(index, sae, TableRequest(label="TOKEN retu", shown="all"))
    assert {row["latent"] for row in found.rows} == {row["latent"] for row in labels if "'return'" in row["label"]}


def test_searching_the_suite_ranks_by_share(index: Index):
    found = by_token(index, SearchRequest(" return"), find_tokens(index, " return"))
    shares = [row["share"] for row in found.rows]
    assert shares == sorted(shares, reverse=True)
    assert len({row["sae"] for row in found.rows}) > 1
    labelled, has_all = by_label(index, SearchRequest("return"))
    assert has_all
    assert all("return" in row["label"] for row in labelled.rows)
    assert find_tokens(index, "#5")[0].token == 5


def test_a_search_tells_all_that_there_are_and_shows_as_many_as_asked(index: Index, suite: Path):
    want = set()
    for sae in index.saes:
        rows = pyarrow.parquet.read_table(suite / sae.folder / "explanations.parquet").to_pylist()
        want |= {(sae.number, row["latent"]) for row in rows if "in code" in row["label"] and row["kind"] not in UNLABELLED}
    short, _ = by_label(index, SearchRequest("in code"))
    assert (len(short.rows), short.total) == (60, len(want))
    whole, _ = by_label(index, SearchRequest("in code", most=6000))
    assert {(row["sae"], row["latent"]) for row in whole.rows} == want
    qualities = [row["quality"] for row in whole.rows]
    assert qualities == sorted(qualities, reverse=True)
    assert whole.rows[:60] == short.rows


def test_facets_narrow_a_search(index: Index):
    whole, _ = by_label(index, SearchRequest("token", most=6000))
    for request, keeps in (
        (SearchRequest("token", site="mlp_out", most=6000), lambda row, sae: sae.site.kind == "mlp_out"),
        (SearchRequest("token", layer=1, most=6000), lambda row, sae: sae.site.layer == 1),
        (SearchRequest("token", width=64, most=6000), lambda row, sae: sae.width == 64),
        (SearchRequest("token", quality="strong", most=6000), lambda row, sae: row["quality"] >= 0.25),
    ):
        found, _ = by_label(index, request)
        want = [row for row in whole.rows if keeps(row, index.saes[row["sae"]])]
        assert 0 < len(want) < whole.total
        assert found.rows == want
        tokens = find_tokens(index, "return")
        rows = by_token(index, replace(request, typed="return"), tokens).rows
        assert rows
        assert all(keeps(row, index.saes[row["sae"]]) for row in rows)
        assert SearchRequest.read(request.query) == request


def test_words_are_stems_and_some_of_them_are_better_than_none(index: Index):
    assert by_label(index, SearchRequest("tokens"))[0].total == by_label(index, SearchRequest("token"))[0].total > 0
    some, has_all = by_label(index, SearchRequest("token unheard-of"))
    assert not has_all
    assert some.total == by_label(index, SearchRequest("token"))[0].total


def test_numbers_and_addresses_lead_to_their_latents(index: Index):
    sae = index.saes[-1]
    found = by_number(index, SearchRequest("200"))
    assert {row["latent"] for row in found.rows} == {200}
    assert [row["sae"] for row in found.rows] == [other.number for other in index.saes if other.width > 200]
    folder = sae.folder
    for typed, want in (
        (folder, None),
        (f"{folder}/185", 185),
        (f"http://127.0.0.1:8017/sae/{folder}/185", 185),
        (f"https://host/x/sae/{folder}/0/185.html", 185),
        (f"/sae/{folder}/?page=2", None),
        ("resid_post/1/256/11/185", 185),
        ("resid_post 1 256 11", None),
    ):
        assert jump(index, typed) == (sae, want), typed
    for typed in (f"{folder}/256", "resid_post/9/256/11/1", "/etc/passwd", f"x{folder}9", "185", ""):
        assert jump(index, typed) is None, typed


@pytest.mark.parametrize(
    "typed", ['"', "a OR b", "NEAR(", "*", "a*b", "label:x", "'; DROP TABLE latents; --", "^", "", "  ", "\x00"]
)
def test_no_search_is_an_error(index: Index, typed: str):
    by_label(index, SearchRequest(typed))
    by_token(index, SearchRequest(typed), find_tokens(index, typed))
    by_number(index, SearchRequest(typed))
    assert jump(index, typed) is None
    latent_page(index, index.saes[0], TableRequest(label=typed, token=typed))
    assert "DROP" not in words_query("'; --")


def test_addresses_that_make_no_sense_are_the_default():
    strange = {"sort": "id; DROP", "order": "sideways", "show": "x", "page": "-3", "label": "a" * 999}
    assert TableRequest.read(strange) == TableRequest(label="a" * 200)
    assert TableRequest.read({"page": "٣"}).page == 1
    request = TableRequest("entropy", False, "dead", "a", "b", 4)
    assert TableRequest.read(request.query) == request


def test_walks_meet_each_living_latent_once(index: Index):
    sae = index.saes[0]
    alive = {row["latent"] for number in (1, 2) for row in latent_page(index, sae, TableRequest(page=number)).rows}
    place, seen = min(alive), set()
    while place not in seen:
        seen.add(place)
        _, _, place = index.beside(sae, place)
    assert seen == alive
    forward, place = [], min(alive)
    while place is not None:
        forward.append(place)
        before, place, _ = index.beside(sae, place)
        assert before == (forward[-2] if len(forward) > 1 else None)
    assert forward == sorted(alive)


def test_matches_are_each_latents_best(index: Index, suite: Path):
    one, other = index.saes[0], next(sae for sae in index.saes if sae.site == index.saes[0].site and sae.width == 256)
    found = index.matches(one, other)
    assert found is not None
    latents, others, cosines = found
    want = {}
    for row in published(suite, one.folder):
        best = [item for item in row["neighbours"] or [] if item["sae"] == other.number]
        if best:
            want[row["latent"]] = max(item["cosine"] for item in best)
    assert dict(zip(latents.tolist(), cosines.tolist(), strict=True)) == want
    assert (np.diff(cosines) <= 0).all()
    assert len(others) == len(latents)
    assert index.matches(one, one) is None


def test_a_part_is_kept_and_is_built_anew_when_its_file_changes(tmp_path: Path):
    suite, cache = write_invented_suite(tmp_path / "suite", PAIR), tmp_path / "cache"
    Preparation(suite, cache).run()
    first = built(cache)
    assert len(first) == 3  # the text and two SAEs
    assert Preparation(suite, cache).is_built
    content = read_sealed(suite / "suite.json")
    write_sealed(suite / "suite.json", content | {"title": "Another"})
    again = Preparation(suite, cache)
    assert again.is_built
    assert again.index.suite["title"] == "Another"
    path = suite / content["saes"][0]["folder"] / "latents.parquet"
    os.utime(path, ns=(1, 1))
    again = Preparation(suite, cache)
    assert not again.is_built
    again.run()
    assert len(set(built(cache)) - set(first)) == 1
    assert len(built(cache)) == 3  # the stale one is gone


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    """The first page reads no table, and a latent's page those of its own SAE alone."""
    shape = replace(PAIR, kinds=("mlp_out", "resid_post"), widths=(40,))  # SAEs of two sites: their latents have no relation
    suite, cache = write_invented_suite(tmp_path / "suite", shape), tmp_path / "cache"
    one = read_sealed(suite / "suite.json")["saes"][0]["folder"]
    preparation = Preparation(suite, cache)
    app = Browser(preparation, None).app()
    assert ask(app, "/").status == 200
    assert built(cache) == []
    assert ask(app, f"/sae/{one}/3").status == 200
    assert [sae.is_indexed for sae in preparation.index.saes] == [True, False]
    assert len(built(cache)) == 2
    found = ask(app, "/search?q=return").text
    assert "1 of 2 SAEs" in found
    assert "return" in found


def test_a_page_that_waits_says_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And other pages do not wait with it."""
    suite = write_invented_suite(tmp_path / "suite", PAIR)
    preparation = Preparation(suite, tmp_path / "cache")
    app, go_on, build = Browser(preparation, None).app(), threading.Event(), preparation_module.build_sae

    def slow(path: Path, suite: Path, record: SaeRecord, *rest) -> None:
        if record.width == 50:
            assert go_on.wait(60)
        build(path, suite, record, *rest)

    monkeypatch.setattr(preparation_module, "build_sae", slow)
    monkeypatch.setattr(Preparation.require, "__defaults__", (0.05,))
    one, other = preparation.index.saes
    whole = preparation.start()  # builds the first, and hangs at the second
    wait_until(lambda: one.is_indexed)
    for sae, status in ((one, 200), (other, 503)):
        assert ask(app, f"/sae/{sae.folder}/3").status == status
    assert "50 latents" in ask(app, f"/sae/{other.folder}/3").text
    assert json.loads(ask(app, "/state?part=1").text)["is_ready"] is False
    go_on.set()
    whole.join()
    assert ask(app, f"/sae/{other.folder}/3").status == 200
    assert json.loads(ask(app, "/state").text) == {
        "is_ready": True,
        "share": 1.0,
        "indexed": 2,
        "error": "",
        "model": "absent",
        "done": None,
    }


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_wishes_outlive_a_part_that_could_not_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_invented_suite(tmp_path / "suite", TINY)
    preparation, make, tried = Preparation(tmp_path / "suite", tmp_path / "cache"), Preparation._make, threading.Event()

    def fails(self: Preparation, *more: Any) -> None:
        tried.wait(10)
        raise StorageError("the disk is full")

    monkeypatch.setattr(Preparation, "_make", fails)
    for number in (TEXT, 0):
        preparation.wish(number)
    tried.set()
    while preparation._helper is not None:
        time.sleep(0.01)
    assert "full" in preparation.error
    monkeypatch.setattr(Preparation, "_make", make)
    for number in (TEXT, 0):
        assert preparation.require(number, 30).is_file()
    assert not preparation.error


def test_a_broken_off_index_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    suite, cache = write_invented_suite(tmp_path / "suite", TINY), tmp_path / "cache"

    def breaks(path: Path, *_) -> None:
        sqlite3.connect(path).execute("CREATE TABLE half(x)").connection.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparation_module, "build_sae", breaks)
        with pytest.raises(KeyboardInterrupt):
            Preparation(suite, cache).run()
    assert len(built(cache)) == 1  # the text
    assert Preparation(suite, cache).run().saes[0].width == 40


def test_several_processes_may_come_at_once(tmp_path: Path):
    suite, cache = write_invented_suite(tmp_path / "suite", TINY), tmp_path / "cache"
    code = "import sys; from pathlib import Path; from everyscope.browse.preparation import Preparation\n"
    code += "print(len(Preparation(Path(sys.argv[1]), Path(sys.argv[2])).run().saes))"
    arguments = [sys.executable, "-c", code, str(suite), str(cache)]
    workers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(3)]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["1"] * 3
    assert len(built(cache)) == 2


def test_a_suite_that_cannot_be_written_is_not(tmp_path: Path):
    suite = write_invented_suite(tmp_path / "suite", TINY)
    before = {path: path.stat().st_mtime_ns for path in suite.rglob("*")}
    paths = [suite, *(path for path in before if path.is_dir())]
    for path in paths:
        path.chmod(0o555)
    try:
        Preparation(suite, tmp_path / "cache").run()
        assert {path: path.stat().st_mtime_ns for path in suite.rglob("*")} == before
    finally:
        for path in paths:
            path.chmod(0o755)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    suite = write_invented_suite(tmp_path / "suite", TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--cache"):
        Preparation(suite, tmp_path / "file").run()


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_module.cache_folder(None) == tmp_path / "everyscope/browse"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_module.cache_folder(None) == Path.home() / ".cache/everyscope/browse"


@pytest.mark.parametrize("damage", ["cut", "text", "rows", "order", "bytes"])
def test_a_damaged_sae_is_named_and_the_others_stay(suite: Path, tmp_path: Path, damage: str):
    copy = Path(shutil.copytree(suite, tmp_path / "suite"))
    path = copy / "mlp_out/layer_0/width_64/average_l0_5/latents.parquet"
    table = pyarrow.parquet.read_table(path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("this is no Parquet")
    elif damage == "rows":
        write_table(path, table.slice(0, 10))
    elif damage == "order":
        write_table(path, table.take(list(reversed(range(64)))))
    else:
        path.write_bytes(content[:200] + bytes(400) + content[600:])
    index = Preparation(copy, tmp_path / "cache").run()
    bad = [sae for sae in index.saes if sae.problem]
    assert [sae.folder for sae in bad] == ["mlp_out/layer_0/width_64/average_l0_5"]
    assert "latents.parquet" in str(bad[0].problem)
    assert str(tmp_path) not in str(bad[0].problem)
    assert index.details(index.saes[1], 0) is not None


def test_suites_that_lead_out_of_themselves_are_refused(tmp_path: Path):
    suite = write_invented_suite(tmp_path / "suite", TINY)
    content = read_sealed(suite / "suite.json")
    for folder in ("../../elsewhere", "/etc", "resid_post/layer_0/width_40/../x", ""):
        content["saes"][0]["folder"] = folder
        write_sealed(suite / "suite.json", content)
        with pytest.raises(DataError, match="names the folder"):
            Preparation(suite, tmp_path / "cache")


def test_what_is_no_suite_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        Preparation(tmp_path / "nothing", None)
    with pytest.raises(DataError, match="no suite"):
        Preparation(tmp_path, None)
    (tmp_path / "suite.json").write_text('{"something": "else"}')
    with pytest.raises(DataError, match="publish the suite again"):
        Preparation(tmp_path, None)


def test_a_run_folder_leads_to_its_suite(tmp_path: Path):
    write_invented_suite(tmp_path / "run/suite", TINY)
    assert Preparation(tmp_path / "run", tmp_path / "cache").title == "Invented scope"


def test_a_damaged_index_is_built_anew_or_said_to_be_damaged(suite: Path, tmp_path: Path):
    """Before it is opened, and while pages are read."""
    folders = [sae.folder for sae in Preparation(suite, tmp_path).run().saes]
    number = 0
    path = Preparation(suite, tmp_path).require(number, 60)
    good = path.read_bytes()
    for bad in (b"", b"no database" * 1000, good[: len(good) // 2]):
        path.write_bytes(bad)
        assert [sae.folder for sae in Preparation(suite, tmp_path).run().saes] == folders
    preparation = Preparation(suite, tmp_path)
    preparation.run()
    app = Browser(preparation, None).app()
    path.write_bytes(b"\xff" * len(good))
    answer = ask(app, f"/sae/{folders[0]}/3")
    assert (answer.status, "is damaged" in answer.text) == (500, True)
    assert not path.exists()
    assert ask(app, f"/sae/{folders[0]}/3").status == 200
