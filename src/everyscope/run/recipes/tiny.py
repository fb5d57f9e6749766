"""The laptop's scope: every sublayer of the bundled model, from the standard library, in minutes on two cores.

Gemma Scope's recipe needs about 10^9 tokens before its thresholds have settled. With some 10^5 this one takes `fast`, which aims
at given L0s. What was tried on the way stands in docs/log.md.
"""

from everyscope.base.bundled import BUNDLED_MODELS
from everyscope.run.config import RunConfig
from everyscope.run.settings import (
    CompareSettings,
    Control,
    DescribeSettings,
    EvaluateSettings,
    ExplainSettings,
    HarvestSettings,
    ModelShape,
    SaeGroup,
)
from everyscope.sae.presets import fast
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import SUBLAYERS, SiteKind
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainSettings

TOKENS = 3 * 2**17
"""Activation vectors per SAE [tokens]."""

CONTEXT = 256
"""Block length [tokens]."""


def group(sites: tuple[SiteKind, ...], layers: tuple[int, ...] | None, widths: tuple[int, ...], l0s: tuple[int, ...]) -> SaeGroup:
    """SAEs that aim at given L0s."""
    return SaeGroup(sites=sites, layers=layers, widths=widths, target_l0s=l0s, num_tokens=TOKENS)


def recipe() -> RunConfig:
    """All three sublayer sites of all four layers, two widths, three sparsities: 72 SAEs, and nine to compare with; and of every
    MLP three transcoders with a skip.
    """
    tuned, untrained = ModelConfig(name=BUNDLED_MODELS[1]), ModelConfig(name=BUNDLED_MODELS[0], weights="random")
    turns = TextConfig(source="standard_library_instructions", context=CONTEXT)
    return RunConfig(
        name="tiny",
        title="Tiny scope",
        model=ModelConfig(name=BUNDLED_MODELS[0]),
        shape=ModelShape(num_layers=4, d_model=128, d_attention=160, num_parameters=1_558_656),
        text=TextConfig(source="standard_library", context=CONTEXT),
        groups=(
            group(SUBLAYERS, None, (512, 1024), (12, 25, 50)),
            SaeGroup(sites=("transcoder",), widths=(512,), target_l0s=(12, 25, 50), skips=(True,), num_tokens=TOKENS),
        ),
        instruction_tuned=Control(model=tuned, text=turns, groups=(group(("resid_post",), (1, 2, 3), (512, 1024), (25,)),)),
        random_weights=Control(model=untrained, groups=(group(SUBLAYERS, (2,), (1024,), (25,)),)),
        preset=fast(d_in=128),
        harvest=HarvestSettings(dtype="bfloat16", bucket_rows=2**16, batch_blocks=4),
        train=TrainSettings(batch_rows=256, checkpoint_steps=256, log_steps=32),
        evaluate=EvaluateSettings(
            num_sequences=64, stride=7, batch_blocks=4, checkpoint_batches=4, uniformity_sequences=8, baseline_sequences=8
        ),
        compare=CompareSettings(num_sequences=8, splitting_sequences=64, probe_tokens=2**12),
        describe=DescribeSettings(num_sequences=384, batch_blocks=4),
        explain=ExplainSettings(saes="*_l0_25_*", num_sequences=256, num_held_out_sequences=256, batch_blocks=8),
    )
