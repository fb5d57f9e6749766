"""A training group trains every SAE as if it were alone, and takes up its state to the bit."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from everyscope.base.errors import ConfigError, DataError, NonFinite, ShapeMismatch
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.presets import fast
from everyscope.sae.trainable import new_sae
from everyscope.sites.names import Site
from everyscope.train.arrays import train_saes
from everyscope.train.checkpoint import load_checkpoint, save_checkpoint
from everyscope.train.config import TrainConfig, TrainSettings
from everyscope.train.engines import engine_for
from everyscope.train.training_group import TrainingGroup

RECIPE = SaePreset(
    learning_rate=1e-2, learning_rate_warmup_steps=5, sparsity_warmup_steps=10, bandwidth=0.1, initial_threshold=0.1
)
CONFIGS = [SaeConfig(width=w, sparsity_coefficient=c, preset=RECIPE) for w, c in ((16, 1e-3), (32, 1e-2))]
FAST = SaeConfig(width=24, target_l0=4, preset=fast(8).model_copy(update={"is_centred": False}))


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 8, generator=generator) for _ in range(count)]


def test_an_sae_trains_the_same_alone_and_in_company():
    together, alone = TrainingGroup(CONFIGS, 8, Normalisation(2.0), 20), TrainingGroup(CONFIGS[1:], 8, Normalisation(2.0), 20)
    for batch in batches(20):
        together.step(batch)
        alone.step(batch)
    for name, tensor in alone.saes[0].tensors().items():
        assert torch.equal(together.saes[1].tensors()[name], tensor)


def test_a_checkpoint_gives_the_same_bits(tmp_path):
    whole = TrainingGroup([*CONFIGS, FAST], 8, Normalisation(2.0), 20)
    for number, batch in enumerate(batches(20)):
        if number == 7:
            save_checkpoint(tmp_path / "c.safetensors", whole, "run", log_bytes=11)
        whole.step(batch)
    resumed = TrainingGroup([*CONFIGS, FAST], 8, Normalisation(2.0), 20)
    place = load_checkpoint(tmp_path / "c.safetensors", resumed, "run")
    assert (place.num_steps_done, place.log_bytes) == (7, 11)
    for batch in batches(20)[7:]:
        resumed.step(batch)
    assert all(torch.equal(whole.tensors()[name], tensor) for name, tensor in resumed.tensors().items())
    with pytest.raises(DataError, match="another run"):
        load_checkpoint(tmp_path / "c.safetensors", resumed, "other run")


def test_train_saes_on_an_array():
    activations = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32) * 30 + 5
    saes = train_saes(activations, CONFIGS, num_tokens=6400, batch_rows=64)
    x = torch.from_numpy(activations)
    fvu = [((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item() for sae in saes]
    assert [sae.d_sae for sae in saes] == [16, 32]
    assert max(fvu) < 0.6
    again = train_saes(activations, CONFIGS, num_tokens=6400, batch_rows=64)
    assert torch.equal(saes[0].W_enc, again[0].W_enc)


def test_arrays_that_are_no_activations_are_refused():
    with pytest.raises(NonFinite):
        train_saes(np.full((100, 4), np.nan, np.float32), CONFIGS, num_tokens=64, batch_rows=64)
    with pytest.raises(ShapeMismatch):
        train_saes(np.zeros((100,), np.float32), CONFIGS, num_tokens=64, batch_rows=64)


def test_configs_refuse_what_cannot_be(tmp_path):
    def group(**changes):
        fields = {"site": Site("resid_post", 0), "shards": tmp_path, "saes": tuple(CONFIGS), "num_tokens": 8192, "out": tmp_path}
        return TrainConfig(**(fields | changes))

    with pytest.raises(ValidationError, match="two SAEs of a training group"):
        group(saes=(CONFIGS[0], CONFIGS[0]))
    with pytest.raises(ValidationError, match="less than one batch"):
        group(num_tokens=10)
    assert group().group_id == group(settings=TrainSettings(log_steps=7)).group_id
    assert group().group_id != group(num_tokens=16384).group_id


def test_pairs_where_there_are_no_kernels_are_refused():
    with pytest.raises(ConfigError, match="engine=auto or dense"):
        engine_for("pairs", [], "mps")
    transcoder = new_sae(SaeConfig(width=6, sparsity_coefficient=1e-3), 8, d_out=5)
    with pytest.raises(ConfigError, match=r"d_in=8, d_out=5 with device=cuda:1.*choose engine=dense"):
        engine_for("auto", [transcoder], "cuda:1")


def test_a_checkpoint_of_another_precision_is_refused(tmp_path):
    def group(products):
        return TrainingGroup([SaeConfig(width=6, sparsity_coefficient=1e-3)], 8, Normalisation(1.0), 5, products=products)

    pytest.importorskip("triton")
    path = tmp_path / "group.safetensors"
    save_checkpoint(path, group("bfloat16"), "run", 0)
    with pytest.raises(DataError, match="was trained in bfloat16, this run trains in float32; set precision=bfloat16"):
        load_checkpoint(path, group("float32"), "run")
    assert load_checkpoint(path, group("bfloat16"), "run").num_steps_done == 0
    save_checkpoint(path, group("float32"), "run", 0)
    assert load_checkpoint(path, group("float32"), "run").num_steps_done == 0
    with pytest.raises(DataError, match="was trained in float32"):
        load_checkpoint(path, group("bfloat16"), "run")
