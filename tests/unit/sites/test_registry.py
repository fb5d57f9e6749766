import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from everyscope.base.errors import ConfigError, ModelError
from everyscope.sites.capture import capture
from everyscope.sites.identity import check_residual_identity
from everyscope.sites.names import SUBLAYERS, Site, sites_of
from everyscope.sites.registry import FAMILIES, adapter_of


def test_every_site_has_the_width_that_the_anatomy_says(model, input_ids, attention_width):
    adapter = adapter_of(model)
    sites = sites_of(("embed", *SUBLAYERS), None, adapter.num_layers)
    found = capture(model, sites, input_ids)
    assert len(found) == 1 + 3 * adapter.num_layers
    for site, x in found.items():
        assert x.shape == (*input_ids.shape, adapter.width(site))
    assert adapter.width(Site("attn_out", 0)) == attention_width


def test_an_unknown_type_is_refused_with_the_list_of_known_ones(bloom):
    with pytest.raises(ModelError) as caught:
        adapter_of(bloom)
    message = str(caught.value)
    assert "'bloom'" in message
    assert "\n" not in message
    assert all(family in message for family in FAMILIES)


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="Linear"):
        adapter_of(nn.Linear(2, 2))


def test_a_model_without_its_head_is_refused(gemma2):
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        adapter_of(gemma2.model)


@pytest.mark.parametrize("kind", SUBLAYERS)
def test_a_layer_out_of_range_is_named_with_the_range(gemma2, kind):
    with pytest.raises(ConfigError, match=r"layer 3 .* 0 to 2"):
        adapter_of(gemma2).hook_point(Site(kind, 3))


def test_multimodal_gemma3_is_read_through_its_language_part():
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=63,
        image_token_id=63,  # pyright: ignore[reportCallIssue]
        boi_token_index=62,
        eoi_token_index=61,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    assert adapter_of(model).num_layers == 2
    assert adapter_of(model).width(Site("attn_out", 1)) == 48
    assert check_residual_identity(model) < 1e-5
