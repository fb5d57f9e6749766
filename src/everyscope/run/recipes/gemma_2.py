"""Gemma Scope's own suites, as in table 1 of the paper (arXiv 2408.05147): sites, layers, widths and token budgets.

Sparsities: the released suites have five per point on 2B and six on 9B; the coefficients of the 9B residual sweep are known
from the files on the hub (2.5e-4, 5e-4, 1e-3, 4e-3 seen, 1.25e-4 and 2e-3 inferred) and serve for all.
"""

from everyscope.run.config import RunConfig
from everyscope.run.settings import DescribeSettings, EvaluateSettings, HarvestSettings, ModelShape, SaeGroup
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import SUBLAYERS, SiteKind
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainSettings

BILLION = 10**9
STORED_TOKENS = 8 * BILLION
"""Rows kept per site; the 2^20 SAEs, which see 16B, read them twice, so that all other sites need not store twice as much."""
SAES_AT_ONCE = 8
"""SAEs that are evaluated or described in one pass: of 2^17 latents, they take 30 GB in float32 on 9B [SAEs]."""
FIVE_SPARSITIES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
SIX_SPARSITIES = (1.25e-4, *FIVE_SPARSITIES)
RESIDUAL: tuple[SiteKind, ...] = ("resid_post",)
SHAPE_2B = ModelShape(num_layers=26, d_model=2304, d_attention=2048, num_parameters=2_614_341_888, vocabulary=256_000)
SHAPE_9B = ModelShape(num_layers=42, d_model=3584, d_attention=4096, num_parameters=9_241_705_984, vocabulary=256_000)
SHAPE_27B = ModelShape(num_layers=46, d_model=4608, d_attention=4096, num_parameters=27_227_128_320, vocabulary=256_000)


def group(
    sites: tuple[SiteKind, ...],
    layers: tuple[int, ...] | None,
    log2_widths: tuple[int, ...],
    billions: int,
    sparsities: tuple[float, ...],
) -> SaeGroup:
    """One row of table 1: widths are powers of two, budgets billions of tokens."""
    widths = tuple(2**exponent for exponent in log2_widths)
    return SaeGroup(sites=sites, layers=layers, widths=widths, sparsity_coefficients=sparsities, num_tokens=billions * BILLION)


def suite(size: str, title: str, shape: ModelShape, groups: tuple[SaeGroup, ...], text: TextConfig | None = None) -> RunConfig:
    """A run of one Gemma 2 with the paper's recipe, which is the default of every stage."""
    suffix = "-it" if size.endswith("_it") else ""
    return RunConfig(
        name=f"gemma_2_{size}",
        title=title,
        model=ModelConfig(name=f"google/gemma-2-{size.removesuffix('_it')}{suffix}", dtype="bfloat16", device="cuda"),
        shape=shape,
        text=text or pretraining_text(),
        groups=groups,
        harvest=HarvestSettings(num_tokens=STORED_TOKENS),
        train=TrainSettings(device="cuda"),
        evaluate=EvaluateSettings(saes_at_once=SAES_AT_ONCE),
        describe=DescribeSettings(saes_at_once=SAES_AT_ONCE),
        max_norm=None,  # the paper leaves out BOS alone
    )


def pretraining_text() -> TextConfig:
    """Web text in place of Gemma's pretraining mixture, which is not public."""
    return TextConfig(source="dataset", dataset="HuggingFaceFW/fineweb", dataset_config="sample-100BT", context=1024)


def gemma_2_2b() -> RunConfig:
    """2B, pretrained: every sublayer at 2^14 and 2^16; layer 12 residual from 2^15 to 2^19; 2^20 at three layers."""
    groups = (
        group(SUBLAYERS, None, (14,), 4, FIVE_SPARSITIES),
        group(RESIDUAL, (12,), (15, 17, 18, 19), 8, SIX_SPARSITIES),
        group(SUBLAYERS, None, (16,), 8, FIVE_SPARSITIES),
        group(RESIDUAL, (5, 12, 19), (20,), 16, SIX_SPARSITIES),
    )
    return suite("2b", "Gemma 2 2B scope", SHAPE_2B, groups)


def gemma_2_2b_transcoders() -> RunConfig:
    """2B, pretrained: a transcoder of every MLP at 2^14, without skip, as in the release's gemma-scope-2b-pt-transcoders.

    Trained on what the MLP receives. The release takes that without the norm's gain; `sae.conventions` converts, exactly.
    """
    groups = (group(("transcoder",), None, (14,), 4, FIVE_SPARSITIES),)
    return suite("2b", "Gemma 2 2B transcoders", SHAPE_2B, groups).model_copy(update={"name": "gemma_2_2b_transcoders"})


def gemma_2_9b() -> RunConfig:
    """9B, pretrained: every sublayer at 2^14 and 2^17; layer 20 residual at four more widths; 2^20 at three layers."""
    groups = (
        group(SUBLAYERS, None, (14,), 4, SIX_SPARSITIES),
        group(SUBLAYERS, None, (17,), 8, SIX_SPARSITIES),
        group(RESIDUAL, (20,), (15, 16, 18, 19), 8, SIX_SPARSITIES),
        group(RESIDUAL, (9, 20, 31), (20,), 16, SIX_SPARSITIES),
    )
    return suite("9b", "Gemma 2 9B scope", SHAPE_9B, groups)


def gemma_2_27b() -> RunConfig:
    """27B, pretrained: the residual stream of three layers at 2^17."""
    return suite("27b", "Gemma 2 27B scope", SHAPE_27B, (group(RESIDUAL, (10, 22, 34), (17,), 8, SIX_SPARSITIES),))


def gemma_2_9b_it() -> RunConfig:
    """9B, instruction-tuned: the residual stream of three layers, on pretraining text wrapped in Gemma's turns."""
    groups = (
        group(RESIDUAL, (9, 20, 31), (14,), 4, FIVE_SPARSITIES),
        group(RESIDUAL, (9, 20, 31), (17,), 8, FIVE_SPARSITIES),
    )
    turns = {"prefix": "<start_of_turn>user\n", "suffix": "<end_of_turn>\n<start_of_turn>model\n"}
    return suite("9b_it", "Gemma 2 9B IT scope", SHAPE_9B, groups, pretraining_text().model_copy(update=turns))
