"""Scopes of small language models of the hub, for one GPU; and Gemma Scope 2's SAEs of its smallest model."""

from everyscope.run.config import RunConfig
from everyscope.run.recipes.gemma_2 import BILLION
from everyscope.run.settings import DescribeSettings, EvaluateSettings, HarvestSettings, ModelShape, SaeGroup
from everyscope.sae.config import SaePreset
from everyscope.sae.presets import fast, gemma_scope_2
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import SUBLAYERS
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainSettings

TOKENS = 50_000_000
"""Activation vectors per SAE of a small scope, which `fast` is for [tokens]."""
SAES_AT_ONCE = 16


def scope(
    name: str, title: str, model: str, shape: ModelShape, groups: tuple[SaeGroup, ...], preset: SaePreset, batch_rows: int
) -> RunConfig:
    """A run on web text in bfloat16, all on one GPU."""
    return RunConfig(
        name=name,
        title=title,
        model=ModelConfig(name=model, dtype="bfloat16", device="cuda"),
        shape=shape,
        text=TextConfig(source="dataset", dataset="HuggingFaceFW/fineweb-edu", dataset_config="sample-10BT", context=1024),
        groups=groups,
        preset=preset,
        harvest=HarvestSettings(dtype="bfloat16"),
        train=TrainSettings(device="cuda", batch_rows=batch_rows),
        evaluate=EvaluateSettings(num_sequences=512, saes_at_once=SAES_AT_ONCE),
        describe=DescribeSettings(saes_at_once=SAES_AT_ONCE),
    )


def small(name: str, title: str, model: str, shape: ModelShape) -> RunConfig:
    """Every sublayer at three depths, two widths, three sparsities: 54 SAEs."""
    layers = tuple(round(share * shape.num_layers) for share in (0.25, 0.5, 0.8))
    group = SaeGroup(
        sites=SUBLAYERS,
        layers=layers,
        widths=(2**12, 2**14),
        target_l0s=(20, 50, 100),
        num_tokens=TOKENS,
    )
    return scope(name, title, model, shape, (group,), fast(shape.d_model), batch_rows=512)


def pythia_70m() -> RunConfig:
    """Pythia 70M."""
    shape = ModelShape(
        num_layers=6, d_model=512, d_attention=512, num_parameters=70_426_624, num_block_parameters=18_914_304,
        vocabulary=50304, context=2048,
    )  # fmt: skip
    return small("pythia_70m", "Pythia 70M scope", "EleutherAI/pythia-70m", shape)


def gpt2_small() -> RunConfig:
    """GPT-2 small."""
    shape = ModelShape(
        num_layers=12, d_model=768, d_attention=768, num_parameters=124_439_808, num_block_parameters=85_054_464,
        vocabulary=50257, context=1024,
    )  # fmt: skip
    return small("gpt2_small", "GPT-2 small scope", "openai-community/gpt2", shape)


def smollm2_135m() -> RunConfig:
    """SmolLM2 135M."""
    shape = ModelShape(
        num_layers=30, d_model=576, d_attention=576, num_parameters=134_515_008, num_block_parameters=106_202_880,
        vocabulary=49152, context=8192,
    )  # fmt: skip
    return small("smollm2_135m", "SmolLM2 135M scope", "HuggingFaceTB/SmolLM2-135M", shape)


def gemma_3_270m() -> RunConfig:
    """Gemma 3 270M, pretrained: the SAEs of Gemma Scope 2's table 1. Its budgets are not stated; these are those of Gemma Scope.

    Every sublayer at 2^14 and 2^18 latents; four layers at more widths and L0s, their residual stream at 2^20 too.
    """
    shape = ModelShape(
        num_layers=18, d_model=640, d_attention=1024, num_parameters=268_098_176, num_block_parameters=100_325_376,
        vocabulary=262144, context=32768,
    )  # fmt: skip
    everywhere, chosen = (10.0, 100.0), (50.0, 150.0)  # the four layers' L0 of 10 at 2^14 and 2^18 is among those of all layers
    groups = (
        _group(SUBLAYERS, None, (14,), everywhere, 4),
        _group(SUBLAYERS, None, (18,), everywhere, 8),
        _group(SUBLAYERS, FOUR, (14,), chosen, 4),
        _group(SUBLAYERS, FOUR, (18,), chosen, 8),
        _group(SUBLAYERS, FOUR, (16,), (10.0, *chosen), 8),
        _group(("resid_post",), FOUR, (20,), (10.0, *chosen), 16),
    )
    return scope("gemma_3_270m", "Gemma 3 270M scope", "google/gemma-3-270m", shape, groups, gemma_scope_2(), batch_rows=4096)


FOUR = (5, 9, 12, 15)
"""The layers at 25, 50, 65 and 85 % of the depth."""


def _group(
    sites: tuple, layers: tuple[int, ...] | None, log2_widths: tuple[int, ...], l0s: tuple[float, ...], billions: int
) -> SaeGroup:
    return SaeGroup(
        sites=sites,
        layers=layers,
        widths=tuple(2**exponent for exponent in log2_widths),
        target_l0s=l0s,
        num_tokens=billions * BILLION,
    )
