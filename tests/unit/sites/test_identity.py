from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from everyscope.base.errors import ModelError
from everyscope.sites.identity import check_residual_identity, default_tolerance
from everyscope.sites.registry import FAMILIES, ModelFamily, inspect_blocks


def test_the_residual_identity_holds_in_every_family(model):
    assert check_residual_identity(model) < 1e-5


@pytest.mark.parametrize("change", [{"mlp_added": "mlp"}, {"attention_added": "self_attn"}])
def test_taking_gemma2s_sublayers_before_their_post_norms_is_caught(gemma2, change):
    naive = inspect_blocks(gemma2, replace(FAMILIES["gemma2"], **change))
    with pytest.raises(ModelError, match=r"layer 0: .*attention and MLP add"):
        check_residual_identity(gemma2, adapter=naive)


def test_reading_gemma2_as_a_pre_norm_family_is_caught(gemma2):
    with pytest.raises(ModelError, match="layer 0"):
        check_residual_identity(gemma2, adapter=inspect_blocks(gemma2, FAMILIES["llama"]))


def test_reading_attn_out_from_another_projection_is_caught(gemma2):
    wrong = inspect_blocks(gemma2, replace(FAMILIES["gemma2"], projection="mlp.down_proj"))
    with pytest.raises(ModelError, match="projection"):
        check_residual_identity(gemma2, adapter=wrong)


def test_a_module_that_never_runs_is_named(gemma2):
    model = deepcopy(gemma2)
    for block in model.model.layers:
        block.spare = torch.nn.Identity()
    with pytest.raises(ModelError, match="did not run the module of 'mlp'"):
        check_residual_identity(model, adapter=inspect_blocks(model, replace(FAMILIES["gemma2"], mlp_added="spare")))


def test_a_module_that_does_not_exist_is_named(gemma2):
    with pytest.raises(ModelError, match="Gemma2DecoderLayer has no spare"):
        check_residual_identity(gemma2, adapter=inspect_blocks(gemma2, replace(FAMILIES["gemma2"], mlp_added="spare")))


def test_bloom_would_be_refused_even_if_it_were_registered(bloom):
    family = ModelFamily(
        ("transformer.h",), "self_attention", "self_attention.dense", "self_attention", "mlp", "post_attention_layernorm"
    )
    with pytest.raises(ModelError, match="layer 0"):
        check_residual_identity(bloom, adapter=inspect_blocks(bloom, family))


def test_the_gate_needs_numbers(gemma2):
    model = deepcopy(gemma2)
    model.model.layers[1].post_feedforward_layernorm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="layer 1"):
        check_residual_identity(model)


def test_bfloat16_passes_under_its_own_tolerance_and_not_under_float32s(gemma2):
    assert default_tolerance(torch.float32) == 1e-5
    rounded = deepcopy(gemma2).to(torch.bfloat16)
    assert 1e-5 < check_residual_identity(rounded) < default_tolerance(torch.bfloat16) < 0.02
    with pytest.raises(ModelError, match="layer 0"):
        check_residual_identity(rounded, adapter=inspect_blocks(rounded, replace(FAMILIES["gemma2"], mlp_added="mlp")))
