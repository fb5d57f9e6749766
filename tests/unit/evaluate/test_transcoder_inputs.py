"""A transcoder of another input form is measured as what it computes: the norm's gain is folded in when it is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everyscope.base.errors import ConfigError
from everyscope.evaluate import run
from everyscope.evaluate.config import EvaluateConfig
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig


@torch.no_grad()
def test_the_gain_is_folded_into_a_transcoder_that_takes_its_input_without_it(tiny_random_model_folder, tmp_path):
    language = load_language_model(str(tiny_random_model_folder))
    d = language.adapter.d_model
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=g) / d**0.5 for shape in ((d, 20), (20, d), (20,), (d,))]
    reads, writes = Site("mlp_in", 1), Site("mlp_out", 1)
    metadata = SaeMetadata(reads, target=writes, convention="normalised")
    coder = Sae(*tensors, torch.rand(20, generator=g), torch.randn(d, d, generator=g), metadata=metadata)  # pyright: ignore[reportCallIssue]
    target: Any = SimpleNamespace(site=Site("transcoder", 1), sae=lambda: coder, is_of_unscaled_embeddings=False, folder="coder")
    sizes: Any = {place: SimpleNamespace(mean=torch.zeros(d)) for place in (reads, writes)}
    config = EvaluateConfig(
        model=ModelConfig(name=str(tiny_random_model_folder)), text=TextConfig(), trained=tmp_path, out=tmp_path / "scores"
    )
    loaded = run._load(target, sizes, config, language.adapter, torch.device("cpu"), 1.0)
    found = capture(language, ["resid_mid.1", "mlp_in.1"], torch.arange(3, 20)[None])
    mid = found["resid_mid.1"].double()
    normalised = (mid / (mid.square().mean(-1, keepdim=True) + language.adapter.config.rms_norm_eps).sqrt()).float()
    torch.testing.assert_close(loaded(found["mlp_in.1"]), coder(normalised), rtol=1e-4, atol=1e-4)
    assert loaded.metadata.convention == "mlp_input"
    coder.metadata = SaeMetadata(Site("resid_mid", 1), target=writes, convention="residual")
    with pytest.raises(ConfigError, match="move it below resid_transcoder"):
        run._load(target, sizes, config, language.adapter, torch.device("cpu"), 1.0)
    target.site, sizes[Site("resid_mid", 1)] = Site("resid_transcoder", 1), sizes[reads]
    as_it_is = run._load(target, sizes, config, language.adapter, torch.device("cpu"), 1.0)
    assert torch.equal(as_it_is(mid.float()), coder(mid.float()))
    coder.metadata = SaeMetadata(reads, target=writes, convention="mlp_input")
    with pytest.raises(ConfigError, match="move it below transcoder/"):
        run._load(target, sizes, config, language.adapter, torch.device("cpu"), 1.0)
