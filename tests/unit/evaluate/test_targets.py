"""SAEs from wherever they were made, and what is said where something is missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_coders import coder
from small_scope import build_scope, random_sae

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import sha256, write_json
from everyscope.base.tensors import write_tensors
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.targets import load_targets
from everyscope.sae.files import write_sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.formats import circuit_tracer, dictionary_learning, gemma_scope_2, llama_scope, qwen_scope, sparsify

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    return build_scope(tmp_path_factory.mktemp("scope"), (Site("mlp_out", 0), SITE))


def released(config: EvaluateConfig, root: Path, *folders: str, **changes) -> EvaluateConfig:
    """An evaluation of params.npz files in `folders` below `root`."""
    sae = random_sae(16, 32, 0.5, torch.zeros(16), seed=0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        np.savez(root / folder / "params.npz", **{name: tensor.numpy() for name, tensor in sae.tensors().items()})
    return config.model_copy(update={"trained": root, "shards": None, **changes})


def test_trained_saes_come_by_site_and_name(config: EvaluateConfig):
    targets = load_targets(config)
    assert [target.place for target in targets] == [
        "mlp_out/layer_0/w32_0",
        "mlp_out/layer_0/w32_1",
        "resid_post/layer_1/w32_0",
        "resid_post/layer_1/w32_1",
    ]
    assert all(target.scores == config.out / target.place and target.sae().d_sae == 32 for target in targets)


def test_sites_and_names_choose(config: EvaluateConfig):
    one = load_targets(config.model_copy(update={"sites": (SITE,)}))
    assert [target.site for target in one] == [SITE, SITE]
    two = load_targets(config.model_copy(update={"saes": ("mlp_out/layer_0/w32_1",)}))
    assert [target.place for target in two] == ["mlp_out/layer_0/w32_1"]
    assert two[0].identity == load_targets(config)[1].identity
    with pytest.raises(DataError, match="has no SAE of the sites asked for; it has SAEs of mlp_out layer 0, resid_post layer 1"):
        load_targets(config.model_copy(update={"sites": (Site("attn_out", 0),)}))
    with pytest.raises(DataError, match="has no SAE mlp_out/layer_0/w64"):
        load_targets(config.model_copy(update={"saes": ("mlp_out/layer_0/w64",)}))
    with pytest.raises(DataError, match="run `everyscope train` first"):
        load_targets(config.model_copy(update={"trained": config.trained / "nothing"}))


@pytest.mark.parametrize(
    ("folder", "site", "name"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", Site("resid_post", 20), "width_16k/average_l0_71"),
        ("gemma-scope-9b-pt-mlp/layer_3/width_131k/average_l0_9", Site("mlp_out", 3), "width_131k/average_l0_9"),
        ("gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_5", Site("attn_out", 0), "width_16k/average_l0_5"),
        ("gemma-scope-2b-pt-transcoders/layer_2/width_16k/average_l0_5", Site("transcoder", 2), "width_16k/average_l0_5"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", Site("embed", 0), "width_4k/average_l0_6"),
        ("mlp_out/layer_7/width_1k/average_l0_2", Site("mlp_out", 7), "width_1k/average_l0_2"),
    ],
)
def test_releases_tell_their_sites_by_their_paths(config: EvaluateConfig, tmp_path: Path, folder: str, site: Site, name: str):
    (target,) = load_targets(released(config, tmp_path, folder))
    assert (target.site, target.name) == (site, name)
    assert target.sae().d_in == 16


def test_a_kind_that_no_path_tells_is_given_or_asked_for(config: EvaluateConfig, tmp_path: Path):
    bare = released(config, tmp_path / "a", "layer_4/width_16k/average_l0_3", "layer_5/width_16k/average_l0_3")
    with pytest.raises(ConfigError, match="set site_kind="):
        load_targets(bare)
    targets = load_targets(bare.model_copy(update={"site_kind": "attn_out"}))
    assert [target.site for target in targets] == [Site("attn_out", 4), Site("attn_out", 5)]
    root = tmp_path / "resid_post" / "embedding" / "mine"
    given = released(config, root, "layer_4/width_16k/average_l0_3", site_kind="attn_out")
    assert [target.site for target in load_targets(given)] == [Site("attn_out", 4)]  # names above do not gainsay what is given
    above = load_targets(given.model_copy(update={"site_kind": None}))
    assert [(target.site, target.is_of_unscaled_embeddings) for target in above] == [(Site("embed", 0), True)]
    with pytest.raises(ConfigError, match="layer cannot be read"):
        load_targets(released(config, tmp_path / "b", "mlp_out/sae"))


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.3.hook_resid_post", Site("resid_post", 3)),
        ("blocks.0.hook_mlp_out", Site("mlp_out", 0)),
        ("blocks.11.attn.hook_z", Site("attn_out", 11)),
        ("hook_embed", Site("embed", 0)),
    ],
)
def test_saelens_folders_name_their_sites(config: EvaluateConfig, tmp_path: Path, hook: str, site: Site):
    sae = random_sae(16, 32, 0.5, torch.zeros(16), seed=0)
    folder = tmp_path / "my_sae"
    write_tensors(folder / "sae_weights.safetensors", sae.tensors())
    about = {"architecture": "jumprelu", "normalize_activations": "none", "apply_b_dec_to_input": False}
    write_json(folder / "cfg.json", about | {"metadata": {"hook_name": hook}})
    for trained in (tmp_path, folder):
        (target,) = load_targets(config.model_copy(update={"trained": trained, "shards": None, "site_kind": "attn_out"}))
        assert (target.site, target.name, target.is_of_unscaled_embeddings) == (site, "my_sae", False)
        assert torch.equal(target.sae().W_enc, sae.W_enc)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in sae.tensors().items()})
    assert len(load_targets(config.model_copy(update={"trained": tmp_path, "shards": None}))) == 1  # one folder is one SAE


def test_an_identity_follows_everything_that_decides(config: EvaluateConfig, tmp_path: Path):
    first = load_targets(config)[0].identity
    for change in (
        {"num_sequences": 9},
        {"stride": 2},
        {"max_norm": None},
        {"sae_dtype": "int8"},
        {"seed": 1},
        {"pca_rows": 50},
        {"shards": None},
    ):
        assert load_targets(config.model_copy(update=change))[0].identity != first
    for change in ({"checkpoint_batches": 9}, {"saes_at_once": 1}, {"out": tmp_path}):
        assert load_targets(config.model_copy(update=change))[0].identity == first
    shutil.copytree(config.trained, tmp_path / "train")
    write_sae(tmp_path / "train" / "mlp_out/layer_0/w32_0", random_sae(16, 32, 0.4, torch.zeros(16), seed=9), {})
    moved = load_targets(config.model_copy(update={"trained": tmp_path / "train"}))
    assert moved[0].identity != first
    assert moved[1].identity == load_targets(config)[1].identity


def test_every_format_is_found_with_its_site(config: EvaluateConfig, tmp_path: Path):
    """One judge for all: whatever lies below a folder is a target, by the site that its own files name."""
    for layer in range(2):
        qwen_scope.write(tmp_path / "qwen", coder(top_k=4, metadata=SaeMetadata(Site("resid_post", layer))), num_layers=2)
    gemma_scope_2.write(tmp_path / "scope_2/layer_3_width_16k_l0_small", coder(metadata=SaeMetadata(Site("attn_out", 3))))
    gemma_scope_2.write(tmp_path / "scope_2/layer_3_width_16k_l0_small_affine", coder(skip=True))
    sparsify.write(tmp_path / "run/layers.1.mlp", coder(top_k=4))
    dictionary_learning.write(tmp_path / "resid_post_layer_1/trainer_0", coder(metadata=SaeMetadata(Site("resid_post", 1))))
    llama_scope.write(tmp_path / "L3", coder())
    circuit_tracer.write(tmp_path / "set", [coder(skip=True)] * 2, model="gpt2", output="hook_mlp_out", scan="a")
    targets = load_targets(config.model_copy(update={"trained": tmp_path, "shards": None}))
    assert {target.place for target in targets} == {
        "resid_post/layer_0/qwen",
        "resid_post/layer_1/qwen",
        "attn_out/layer_3/scope_2/layer_3_width_16k_l0_small",
        "transcoder/layer_3/scope_2/layer_3_width_16k_l0_small_affine",
        "mlp_out/layer_1/run/layers.1.mlp",
        "resid_post/layer_1/resid_post_layer_1/trainer_0",
        "resid_post/layer_3/L3",
        "transcoder/layer_0/set",
        "transcoder/layer_1/set",
    }
    for target in targets:
        sae = target.sae()
        assert (sae.d_sae, sae.metadata.coder_site) == (40, target.site)
        assert target.digest == sha256(target.weights)
