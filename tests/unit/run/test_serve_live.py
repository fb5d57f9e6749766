"""`everyscope serve RECIPE --live`: what it derives from a recipe, and one line for whatever is wrong."""

import pytest

from everyscope.cli.main import main
from everyscope.run.config import LIVE_CHUNKS
from everyscope.run.find import RECIPES, find_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_bucket_has_many_chunks_and_laggards_are_waited_for(name, tmp_path):
    recipe = find_recipe(name)
    config = recipe.live_config(tmp_path)
    assert 1 <= config.chunk_rows * LIVE_CHUNKS <= recipe.harvest.bucket_rows
    assert config.hold_seconds > 0
    assert config.read_threads == 1
    few = recipe.model_copy(update={"harvest": recipe.harvest.model_copy(update={"num_tokens": 3})})
    assert few.live_config(tmp_path).chunk_rows == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("no_such_recipe", "--live"), "unknown recipe"),
        (("tiny", "--live", "--buffer-bytes", "0"), "buffer_bytes"),
        (("tiny", "--live", "--slice", "2/2"), "expected I/N"),
        (("tiny", "--live", "--shards", "x"), "--shards"),
        (("tiny", "--live", "--shape.d-model", "7", "--buffer-bytes", "9"), "set shape.d_model=128"),
        (("runs/none", "--out", "x"), "serve a recipe with --live"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert complaint in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_buffer_that_is_too_small_is_told_the_size(capsys, tmp_path):
    fields = "--harvest.num-tokens 600 --harvest.bucket-rows 300 --text.context 64 --groups.0.layers 1 --groups.0.sites mlp_out"
    with pytest.raises(SystemExit):
        main(["serve", "tiny", "--live", "--out", str(tmp_path), "--buffer-bytes", "1000", *fields.split()])
    assert "set buffer_bytes=" in capsys.readouterr().err
