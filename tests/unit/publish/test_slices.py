import json

import pytest
from invented_scores import SITES

from everyscope.base.errors import DataError
from everyscope.base.files import write_sealed
from everyscope.publish.config import PublishConfig
from everyscope.publish.slices import publish_slices
from everyscope.suite.reader import load_suite


def test_slices_call_saes_by_their_folders(published: PublishConfig):
    suite = load_suite(published.out)
    folders = {f"{entry.site.folder}/{entry.record.name}": entry.record.folder for entry in suite}
    narrow, wide = (folders[f"{SITES[-1].folder}/{name}"] for name in ("w512_0.5", "w1024_0.5"))
    slices = {path.stem: json.loads(path.read_text()) for path in (suite.root / "slices").glob("*.json")}
    pair = slices["splitting"]["pairs"][0]
    assert (pair["narrow"], pair["wide"]) == (narrow, wide)
    assert (suite.root / "slices" / pair["table"]).read_bytes() == (published.scores / "slices" / pair["table"]).read_bytes()
    assert [point["sae"] for point in slices["widths"]["groups"][0]["points"]] == [narrow, wide]
    assert {row["sae"] for row in slices["precision"]["rows"]} == {narrow, wide}
    assert [subset["name"] for subset in slices["subsets"]["subsets"]] == ["a", "b"]
    names = {row["sae"]: row["name"] for row in slices["transfer"]["rows"]}
    assert names == {"base": narrow, "tuned": f"{SITES[-1].folder}/w512_0.5"}


def test_a_slice_about_something_else_is_refused(tmp_path):
    folder = tmp_path / "scores/slices"
    folder.mkdir(parents=True)
    write_sealed(folder / "precision.json", {"rows": [{"sae": "mlp_out/layer_0/gone"}]})
    with pytest.raises(DataError, match=r"precision\.json: is about mlp_out/layer_0/gone, which is not published"):
        publish_slices(tmp_path / "scores", tmp_path / "suite", {})
    (folder / "precision.json").unlink()
    write_sealed(folder / "splitting.json", {"pairs": [{"narrow": "a", "wide": "b", "table": "splitting/x.parquet"}]})
    with pytest.raises(DataError, match=r"names splitting/x\.parquet, which is missing"):
        publish_slices(tmp_path / "scores", tmp_path / "suite", {"a": "A", "b": "B"})
