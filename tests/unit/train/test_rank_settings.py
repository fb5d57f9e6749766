"""Meshes that cannot be are refused by name before anything starts; those that can train the same training group, by name."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from everyscope.sae.config import SaeConfig
from everyscope.sites.names import Site
from everyscope.train.config import TrainConfig, TrainSettings

CODE = """
import json, sys
import everyscope.train.run
print(json.dumps([name for name in sys.modules if name.startswith(("torch.distributed.launcher", "torch.distributed.elastic",
    "torch.distributed.run", "ray"))]))
"""


def group(tmp_path, **settings) -> TrainConfig:
    return TrainConfig(
        site=Site("mlp_out", 0),
        shards=tmp_path,
        saes=(SaeConfig(width=8, sparsity_coefficient=0), SaeConfig(width=3, sparsity_coefficient=0)),
        num_tokens=8192,
        settings=TrainSettings(**settings),
        out=tmp_path,
    )


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="does not divide by replicas=3"):
        group(tmp_path, replicas=3)
    with pytest.raises(ValidationError, match="an SAE of width 3 has not so many latents"):
        group(tmp_path, latent_shards=4)
    with pytest.raises(ValidationError, match="choose cpu or cuda"):
        group(tmp_path, latent_shards=2, device="mps")
    fields = group(tmp_path, latent_shards=2).model_dump() | {"source": "flight://127.0.0.1:1/mlp_out/layer_0", "order": "any"}
    with pytest.raises(ValidationError, match="each would take other rows"):
        TrainConfig(**fields)
    assert group(tmp_path, latent_shards=3, replicas=2).settings.ranks == 6


def test_how_many_train_is_no_part_of_what_is_trained(tmp_path):
    assert group(tmp_path, latent_shards=3, replicas=2).group_id == group(tmp_path).group_id


def test_one_process_loads_no_launcher():
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
