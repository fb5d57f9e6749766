"""The laptop's scope: every sublayer of the bundled model, from the standard library, in minutes on two cores.

Gemma Scope's recipe needs about 10^9 tokens before its thresholds have settled. With some 10^5 this one takes `fast`, which aims
at given L0s. What was tried on the way stands in docs/log.md.
"""

from everyscope.base.bundled import BUNDLED_MODELS
from everyscope.recipe import EvaluateSettings, HarvestSettings, ModelShape, RunConfig, SaeGroup
from everyscope.sae.recipes import fast
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import SUBLAYERS
from everyscope.text.config import TextConfig
from everyscope.train.config import BankSettings

TOKENS = 3 * 2**17
"""Activation vectors per SAE [tokens]."""

RATE = 2e-3
"""Two thirds of fast's own, which at batches of 256 rows let one SAE of 72 collapse (docs/log.md) [1]."""


def recipe() -> RunConfig:
    """All three sublayer sites of all four layers, two widths, three sparsities: 72 SAEs."""
    return RunConfig(
        name="tiny",
        title="Tiny scope",
        model=ModelConfig(name=BUNDLED_MODELS[0]),
        shape=ModelShape(num_layers=4, d_model=128, d_attention=160, num_parameters=1_558_656),
        text=TextConfig(source="standard_library", context=256),
        groups=(
            SaeGroup(
                sites=SUBLAYERS, widths=(512, 1024), sparsity_coefficients=(4.0,), target_l0s=(12, 25, 50), num_tokens=TOKENS
            ),
        ),
        recipe=fast(d_in=128).model_copy(update={"learning_rate": RATE}),
        harvest=HarvestSettings(dtype="bfloat16", bucket_rows=2**16, batch_blocks=4),
        train=BankSettings(batch_rows=256, checkpoint_steps=256, log_steps=32),
        evaluate=EvaluateSettings(num_sequences=64, batch_blocks=4, checkpoint_batches=4, pca_rows=2**17),
    )
