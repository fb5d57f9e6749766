"""One flag places a run; without it the run's folder, the recipe or the machine decides."""

import pytest

from everyscope.base.errors import ConfigError
from everyscope.base.files import write_json
from everyscope.cli import recipe as cli_recipe
from everyscope.cli.recipe import device_of, placed_on
from everyscope.run import checks
from everyscope.run.checks import check_device
from everyscope.run.placement import Devices
from everyscope.run.recipes.tiny import recipe
from everyscope.run.stages import RECIPE_FILE
from everyscope.train.config import TrainSettings


def test_all_models_and_training_are_placed():
    config = placed_on(recipe(), "cuda:1")
    models = [config.model, config.instruction_tuned.model, config.random_weights.model]
    assert {model.device for model in models} == {"cuda:1"} == {config.train.device}
    assert config.train.products == "bfloat16"
    assert placed_on(config, "cpu") == recipe()


def test_the_device_is_found(tmp_path, monkeypatch):
    config = recipe()
    monkeypatch.setattr(checks, "found_devices", lambda engine: Devices(80 << 30, 1, 1))
    monkeypatch.setattr(cli_recipe, "GPU_DRIVERS", (str(tmp_path / "no driver"),))
    assert device_of(config, tmp_path) is None  # torch is not even asked
    monkeypatch.setattr(cli_recipe, "GPU_DRIVERS", (str(tmp_path),))
    monkeypatch.setattr(checks, "found_devices", lambda engine: None)
    assert device_of(config, tmp_path) is None
    monkeypatch.setattr(checks, "found_devices", lambda engine: Devices(80 << 30, 1, 1))
    assert device_of(config, tmp_path) == "cuda"
    said = config.model_copy(update={"train": TrainSettings(device="cpu")})
    assert device_of(said, tmp_path) is None
    write_json(tmp_path / RECIPE_FILE, config.as_json())  # a run that began on the CPU
    assert device_of(config, tmp_path) == "cpu"


def test_mps_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"train.device='mps': statistics and scores are summed in float64"):
        check_device("mps", "train.device")


def test_precision_is_bfloat16_where_it_has_kernels():
    assert TrainSettings().products == "float32"
    assert TrainSettings(device="cuda").products == "bfloat16"
    assert TrainSettings(device="cuda:0", engine="pairs").products == "bfloat16"
    assert TrainSettings(device="cuda", engine="dense").products == "float32"
    assert TrainSettings(device="cuda", precision="float32").products == "float32"
    for settings in ({}, {"device": "cuda", "engine": "dense"}):
        with pytest.raises(ValueError, match="choose these, or precision=float32"):
            TrainSettings(precision="bfloat16", **settings)
