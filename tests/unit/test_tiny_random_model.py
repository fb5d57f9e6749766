"""The shared random model is what its docstring says, so that pipeline tests can lean on it."""

import torch

from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.text.tokenizer import load_tokenizer


def test_the_random_model_loads_and_has_the_sizes_it_says(tiny_random_model_folder):
    model = load_language_model(ModelConfig(name=str(tiny_random_model_folder)))
    widths = [model.adapter.width(Site(kind, 1)) for kind in ("attn_out", "mlp_out", "resid_post")]
    assert (model.adapter.num_layers, widths) == (2, [48, 32, 32])
    tokenizer = load_tokenizer(str(tiny_random_model_folder))
    assert tokenizer.bos_token_id == load_tokenizer("tiny").bos_token_id
    input_ids = torch.randint(0, len(tokenizer), (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.model(input_ids).logits
    assert logits.shape == (2, 64, len(tokenizer))
    assert torch.isfinite(logits).all()
