import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from invented_scores import SITES, add_sae, add_slices
from small_scope import tree_bytes

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import sha256, write_sealed
from everyscope.publish import pages
from everyscope.publish import run as publish
from everyscope.publish.config import PublishConfig
from everyscope.sites.names import Site
from everyscope.suite.reader import load_suite
from everyscope.suite.verify import verify_suite


def edit(path: Path, **changes) -> None:
    """Change some keys of a sealed JSON file, as the stage that writes it would; "absent" takes one away."""
    value = json.loads(path.read_text()) | changes
    write_sealed(path, {key: its for key, its in value.items() if its != "absent" and key != "identity"})


def test_the_suite_is_the_tree_of_the_contract(published: PublishConfig):
    suite = load_suite(published.out)
    assert len(suite) == 36
    for entry in suite:
        assert re.fullmatch(r"(attn_out|mlp_out|resid_post)/layer_[01]/width_(512|1k)/average_l0_\d+(_\d+)?", entry.record.folder)
        names = {path.name for path in entry.folder.iterdir()}
        assert names == {"params.npz", "cfg.json", "sae_weights.safetensors", "metrics.json", "latents.parquet"}
        assert entry.sae().d_sae == entry.width
        scores = published.scores / entry.site.folder / entry.record.name / "metrics.json"
        assert (entry.folder / "metrics.json").read_bytes() == scores.read_bytes()
    top = {path.name for path in suite.root.iterdir()} - {"attn_out", "mlp_out", "resid_post"}
    assert top == {"suite.json", "README.md", "table.parquet", "cost.json", "report", "saebench", "slices"}
    site = Site("mlp_out", 1)
    assert [entry.site for entry in suite.find(site, 512)] == [site] * 3
    middle = suite.find(site, 512)[1]
    assert suite.nearest(site, 512, middle.metrics.l0 + 0.01) == middle
    with pytest.raises(DataError, match="widths there: 512, 1024"):
        suite.nearest(site, 2048, 10)
    verify_suite(published.out)


def test_every_file_but_the_index_and_the_cost_has_a_checksum(published: PublishConfig):
    index = load_suite(published.out).index
    known = {*index.files, *(f"{sae.folder}/{name}" for sae in index.saes for name in sae.files)}
    assert known == set(tree_bytes(published.out)) - {"suite.json", "cost.json"}


def test_headlines_say_what_the_metrics_say(published: PublishConfig):
    for entry in load_suite(published.out):
        metrics, headline = json.loads((entry.folder / "metrics.json").read_text()), entry.metrics
        for name in ("l0", "fvu", "fvu_usual", "delta_loss", "kl", "cosine"):
            assert getattr(headline, name) == metrics[name]
        assert list(headline.intervals.fvu or ()) == metrics["intervals"]["fvu"]
        assert headline.intervals.loss_recovered is None
        assert headline.baselines_fvu["pca"] == metrics["baselines"]["pca"]["fvu_usual"]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("wanted", "targets", "place"), [(None, (None, None), 0), (1000.0, (None, None), 1), (None, (10.0, 160.0), 0)]
)
def test_one_sae_of_each_site_and_width_is_canonical(few: PublishConfig, wanted, targets, place: int):
    """L0 nearest to what is asked for, else to the middle of the targets (of two the lower), else to 100."""
    for site in SITES[-2:]:
        for threshold, target in zip((0.5, 0.2), targets, strict=True):
            edit(few.trained / site.folder / f"w512_{threshold}" / "sae.json", config={"target_l0": target})
    publish.run(few.model_copy(update={"canonical_l0": wanted}))
    suite = load_suite(few.out)
    for site in SITES[-2:]:
        assert [entry.metrics.is_canonical for entry in suite.find(site)] == [place == 0, place == 1]


def test_publishing_twice_does_nothing_and_bytes_do_not_vary(few: PublishConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "SECTIONS", (pages.depth_section, pages.firing_section))  # two pictures stand for all
    publish.run(few)
    bytes_before = tree_bytes(few.out)
    publish.run(few.model_copy(update={"out": few.out.parent / "elsewhere"}))
    assert tree_bytes(few.out.parent / "elsewhere") == bytes_before
    monkeypatch.setattr(publish, "read_sae", lambda *_: pytest.fail("there was nothing to do"))
    publish.run(few)
    assert tree_bytes(few.out) == bytes_before


@pytest.mark.usefixtures("without_figures")
def test_an_interrupted_publication_has_no_index_and_is_finished_later(few: PublishConfig, monkeypatch: pytest.MonkeyPatch):
    publish.run(few)
    want = tree_bytes(few.out)
    with monkeypatch.context() as patched:
        patched.setattr(publish, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish.run(few.model_copy(update={"title": "Another"}))
    assert not (few.out / "suite.json").exists()
    publish.run(few)
    assert tree_bytes(few.out) == want


@pytest.mark.usefixtures("without_figures")
def test_what_is_no_longer_there_leaves_the_suite_but_files_of_others_stay(few: PublishConfig):
    publish.run(few)
    want = tree_bytes(few.out)
    add_sae(few, SITES[-1], "w1024_0.5", 1024, 0.5)
    add_slices(few, SITES[-1], "w512_0.5", "w1024_0.5")
    publish.run(few)
    (few.out / "resid_post/layer_1/width_1k/notes.txt").write_text("mine")
    shutil.rmtree(few.trained / SITES[-1].folder / "w1024_0.5")
    shutil.rmtree(few.scores / "slices")
    (few.scores / "cost.json").unlink()
    publish.run(few)
    assert tree_bytes(few.out) == want | {"resid_post/layer_1/width_1k/notes.txt": b"mine"}


@pytest.mark.usefixtures("without_figures")
def test_seconds_change_nothing_but_the_cost(few: PublishConfig):
    add_sae(few, SITES[-1], "w1024_0.5", 1024, 0.5)
    add_slices(few, SITES[-1], "w512_0.5", "w1024_0.5")
    publish.run(few)
    bytes_before = tree_bytes(few.out)
    edit(few.scores / "cost.json", seconds=9.5)
    shutil.rmtree(few.out)
    publish.run(few)
    changed = tree_bytes(few.out)
    assert [name for name, content in changed.items() if content != bytes_before[name]] == ["cost.json"]


@pytest.mark.usefixtures("without_figures")
def test_two_saes_of_one_rounded_l0_get_folders_of_their_own(few: PublishConfig, capsys: pytest.CaptureFixture[str]):
    add_sae(few, SITES[-1], "twin", 512, 0.2)
    folders = [entry.record.folder for entry in load_suite(publish.run(few).suite).find(SITES[-1], 512)]
    assert len(folders) == len(set(folders)) == 3
    assert any(folder.endswith("_2") for folder in folders)
    assert "Two SAEs round to" in capsys.readouterr().err


@pytest.mark.usefixtures("without_figures")
def test_a_flipped_byte_is_named(few: PublishConfig):
    publish.run(few)
    for name in ("report/index.html", "table.parquet", "resid_post/layer_1/width_512"):
        path = few.out / name
        path = path if path.is_file() else next(path.glob("*/params.npz"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        original, _ = path.read_bytes(), path.write_bytes(bytes(content))
        with pytest.raises(DamagedData, match=re.escape(str(path))):
            verify_suite(few.out)
        path.write_bytes(original)
    verify_suite(few.out)
    (few.out / "README.md").unlink()
    with pytest.raises(DamagedData, match=r"README\.md.*missing"):
        verify_suite(few.out)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("by_bytes", [True, False])
@pytest.mark.parametrize("name", ["params.npz", "README.md", "cost.json", "suite.json"])
def test_publishing_again_repairs_what_verify_finds(few: PublishConfig, name: str, by_bytes: bool):
    add_sae(few, SITES[-1], "w1024_0.5", 1024, 0.5)
    add_slices(few, SITES[-1], "w512_0.5", "w1024_0.5")
    publish.run(few)
    want = tree_bytes(few.out)
    path = next(few.out.rglob(name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{name}.*again"):
        verify_suite(few.out)
    publish.run(few, by_bytes=by_bytes)
    verify_suite(few.out)
    assert tree_bytes(few.out) == want


@pytest.mark.usefixtures("without_figures")
def test_a_finished_run_reads_no_weights_again(few: PublishConfig, monkeypatch: pytest.MonkeyPatch):
    publish.run(few)
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    for module in ("publish.run", "publish.targets", "publish.descriptions", "publish.slices", "suite.verify", "sae.files"):
        monkeypatch.setattr(f"everyscope.{module}.sha256", counted)
    publish.run(few, by_bytes=False)
    assert not [name for name in read if name.endswith((".safetensors", ".npz"))]
    publish.run(few)
    assert len([name for name in read if name.endswith((".safetensors", ".npz"))]) == 2 * len(load_suite(few.out))


def changed(value, path: str, new):
    """A copy of a JSON value with `new` at a dotted path."""
    key, _, rest = path.partition(".")
    copy: Any = list(value) if isinstance(value, list) else dict(value)
    place: Any = int(key) if isinstance(value, list) else key
    copy[place] = changed(value[place], rest, new) if rest else new
    return copy


@pytest.mark.usefixtures("without_figures")
def test_no_number_or_name_of_suite_json_changes_unseen(few: PublishConfig):
    """As an accident leaves it, and sealed again, as someone would who means it."""
    publish.run(few)
    path = few.out / "suite.json"
    good = json.loads(path.read_text())
    body = {key: value for key, value in good.items() if key != "identity"}
    cases = [
        ("saes.0.metrics.fvu", 0.01),
        ("saes.0.metrics.l0", -1.0),
        ("saes.0.metrics.dead_fraction", 1.5),
        ("saes.0.metrics.loss_recovered", "much"),
        ("saes.0.width", 2**40),
        ("saes.0.width", 513),
        ("saes.0.d_in", 7),
        ("saes.0.layer", -5),
        ("saes.0.folder", "../../elsewhere"),
        ("saes.0.folder", good["saes"][1]["folder"]),
        ("saes.0.files", {}),
        ("saes.0.files", good["saes"][0]["files"] | {"../metrics.json": "0" * 64}),
        ("saes.0.files", good["saes"][0]["files"] | {"params.npz": "0" * 64}),
        ("saes.0.site", "mlp_out"),
        ("files", {"../../../etc/passwd": "0" * 64}),
        ("files", {"/etc/passwd": "0" * 64}),
        ("measured.num_tokens", -1),
        ("cost", "0"),
    ]
    for where, new in cases:
        path.write_text(json.dumps(changed(good, where, new)))
        with pytest.raises(DamagedData, match=r"suite\.json: its identity"):
            load_suite(few.out)
        write_sealed(path, changed(body, where, new))
        with pytest.raises(DataError, match="again"):
            verify_suite(few.out)
    write_sealed(path, body)
    verify_suite(few.out)


def test_scores_know_the_weights_that_they_are_of(few: PublishConfig):
    folders = [few.trained / SITES[-1].folder / f"w512_{threshold}" for threshold in (0.2, 0.5)]
    for name in ("sae.safetensors", "sae.json"):  # a whole and valid SAE, but not the one that was scored
        shutil.copy(folders[0] / name, folders[1] / name)
    with pytest.raises(DataError, match=r"of other weights.*everyscope evaluate"):
        publish.run(few)


@pytest.mark.parametrize("name", ["metrics.json", "latents.parquet"])
def test_scores_that_were_changed_are_not_published(few: PublishConfig, name: str):
    path = few.scores / SITES[-1].folder / "w512_0.2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=re.escape(str(path))):
        publish.run(few)
    assert not (few.out / "suite.json").exists()


def test_missing_scores_and_missing_saes_are_named(few: PublishConfig):
    with pytest.raises(DataError, match="everyscope train"):
        publish.run(few.model_copy(update={"trained": few.out / "nothing"}))
    path = few.scores / SITES[-1].folder / "w512_0.2" / "metrics.json"
    edit(path, kl="absent", intervals="absent", firing="absent", massive="absent")
    with pytest.raises(DataError, match=r"metrics\.json: lacks kl, intervals, firing and 1 more; .*everyscope evaluate. again"):
        publish.run(few)
    path.unlink()
    with pytest.raises(DataError, match=r"w512_0\.2.*everyscope evaluate"):
        publish.run(few)
    assert not few.out.exists()
