"""A run made from a model's name: defaults that fit the model, the machine and the hours. Torch-free."""

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from everyscope.base.errors import ConfigError
from everyscope.run.config import RunConfig
from everyscope.run.settings import (
    CompareSettings,
    DescribeSettings,
    EvaluateSettings,
    ExplainSettings,
    HarvestSettings,
    ModelShape,
    SaeGroup,
)
from everyscope.sae.presets import fast
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import SiteKind
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainSettings

DEPTHS = (0.5, 0.85)
"""Where layers are taken by default, as shares of the model's depth: two of the four of Gemma Scope 2 [1]."""
L0S = (20.0, 50.0, 100.0)
EXPANSION, WIDEST = 8, 2**14
"""Latents for each input by default, rounded down to a power of two, and at most [latents]."""
LEAST_TOKENS, MOST_TOKENS = 2**16, 2**28
"""Between these the tokens are chosen by the hours [tokens]."""
MOST_PASSES = 8
"""Times that training reads its rows, at most: beyond that the FVU of held-out documents hardly falls any more (docs/log.md)."""
BATCH_ROWS = 256
PROSE = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
"""Dataset and subset that are read where no text is named."""


@dataclass(frozen=True)
class Machine:
    """What matters of this machine."""

    device: str
    """cpu or cuda."""
    dtype: str
    """The number format in which a model is fastest here."""


@dataclass(frozen=True)
class UserChoices:
    """What the command line says; None leaves it to the defaults."""

    sites: tuple[SiteKind, ...] = ("resid_post",)
    layers: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    l0s: tuple[float, ...] = L0S
    tokens: int | None = None
    """Of text that are harvested [tokens]."""
    passes: int | None = None
    """Times that training reads what was harvested."""
    text: str | None = None
    hours: float = 1.0
    """How long all stages may take [h]."""


SecondsOf = Callable[[RunConfig], dict[str, float]]
"""What each stage of a run is expected to take, by name [s]."""


def automatic(
    model: str, shape: ModelShape, machine: Machine, choices: UserChoices, text: TextConfig, seconds_of: SecondsOf
) -> RunConfig:
    """The run of `choices` on `model`, with as many tokens as the hours allow, read as often as pays.

    ConfigError where the hours do not even allow the least, or the tokens fill no batch.
    """
    if choices.hours <= 0:
        raise ConfigError(f"--hours {choices.hours:g}: expected a time above 0")
    if choices.passes is not None and choices.passes < 1:
        raise ConfigError(f"--passes {choices.passes}: expected at least 1")

    def of(tokens: int, scale: float = 1.0, passes: int = 1) -> RunConfig:
        return _config(model, shape, machine, choices, text, tokens, scale, passes)

    def hours_of(config: RunConfig) -> float:
        return sum(seconds_of(config).values()) / 3600

    passes = choices.passes or passes_that_pay(seconds_of(of(LEAST_TOKENS)))
    if choices.tokens is not None:
        if choices.tokens * passes < BATCH_ROWS:
            raise ConfigError(
                f"--tokens {choices.tokens}: read {passes} times they fill no training batch of {BATCH_ROWS} rows; "
                f"give --tokens {-(-BATCH_ROWS // passes)} or more"
            )
        return of(choices.tokens, passes=passes)
    scale, tokens = 1.0, MOST_TOKENS
    while hours_of(of(LEAST_TOKENS, scale, passes)) > 0.7 * choices.hours and scale > 1 / 16:
        scale /= 2  # fewer held-out blocks, so that a share of the time is left for training
    while hours_of(of(LEAST_TOKENS, scale, passes)) > choices.hours and passes > 1 and choices.passes is None:
        passes -= 1
    least = hours_of(of(LEAST_TOKENS, scale, passes))
    if least > choices.hours:
        raise ConfigError(
            f"--hours {choices.hours:g}: the smallest run takes about {least:.2g} h here; give more hours, "
            "fewer --layers or --l0, or narrower --widths"
        )
    while tokens > LEAST_TOKENS and hours_of(of(tokens, scale, passes)) > choices.hours:
        tokens = max(LEAST_TOKENS, tokens * 3 // 4 // BATCH_ROWS * BATCH_ROWS)
    return of(tokens, scale, passes)


def passes_that_pay(seconds: dict[str, float]) -> int:
    """How often training reads its rows, from what one pass over them costs beside making them.

    A second and a third pass lower the FVU of held-out documents by a tenth or more, further ones by less and less, as more text
    would (docs/log.md): with r the cost of a row over that of training on it once, 1.5 + 1.5 sqrt(r) spends a given time best.
    """
    ratio = seconds["harvest"] / max(seconds["train"], 1e-9)
    return max(1, min(MOST_PASSES, math.floor(1.5 + 1.5 * math.sqrt(ratio))))


def text_of(given: str | None, context: int) -> TextConfig:
    """The corpus that --text names: a file or folder, or a Hugging Face dataset; by default educational web pages. Shuffled, for
    what is stored together is alike, and a small budget would see the first of it alone.

    ConfigError where there is no default, for datasets need a package.
    """
    if given is None:
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(
                "which text? give --text FILE, FOLDER or DATASET; the default, FineWeb-Edu, needs pip install 'everyscope[data]'"
            )
        return TextConfig(source="dataset", dataset=PROSE[0], dataset_config=PROSE[1], shuffle_seed=0, context=context)
    if Path(given).exists():
        return TextConfig(source="files", paths=(Path(given),), shuffle_seed=0, context=context)
    if "/" in given and not given.startswith((".", "/", "~")):
        return TextConfig(source="dataset", dataset=given, shuffle_seed=0, context=context)
    raise ConfigError(f"--text {given}: no such file or folder, and no name of a dataset, as in owner/name")


def slug(model: str) -> str:
    """A model's public name as a folder's: without its owner, or the folders above it."""
    return re.sub(r"[^a-z0-9]+", "_", Path(model).name.lower()).strip("_") or "model"


def context_of(shape: ModelShape, machine: Machine) -> int:
    """The block length by default [tokens]."""
    return min(1024 if machine.device == "cuda" else 256, shape.context or 1024)


def _config(
    model: str,
    shape: ModelShape,
    machine: Machine,
    choices: UserChoices,
    text: TextConfig,
    tokens: int,
    scale: float,
    passes: int,
) -> RunConfig:
    layers = choices.layers or tuple(
        dict.fromkeys(min(shape.num_layers - 1, round(share * shape.num_layers)) for share in DEPTHS)
    )
    widest = min(WIDEST, EXPANSION * shape.d_model)
    group = SaeGroup(
        sites=choices.sites,
        layers=layers,
        widths=choices.widths or (1 << (widest.bit_length() - 1),),
        target_l0s=choices.l0s,
        num_tokens=passes * tokens,
    )
    blocks = max(16, int(256 * scale))
    return RunConfig(
        name=slug(model),
        title=f"{Path(model).name} scope",
        model=ModelConfig.model_validate({"name": model, "dtype": machine.dtype, "device": machine.device}),
        shape=shape,
        public_model=Path(model).name if Path(model).is_dir() else None,
        text=text,
        groups=(group,),
        preset=fast(shape.d_model),
        harvest=HarvestSettings(num_tokens=tokens, dtype="bfloat16", bucket_rows=min(2**20, max(2**16, tokens // 4))),
        train=TrainSettings(device=machine.device, batch_rows=BATCH_ROWS),
        evaluate=EvaluateSettings(
            num_sequences=blocks, batch_blocks=8, saes_at_once=16, uniformity_sequences=0, baseline_sequences=max(4, blocks // 16)
        ),
        compare=CompareSettings(slices=("widths", "splitting"), splitting_sequences=blocks),
        describe=DescribeSettings(num_sequences=4 * blocks, batch_blocks=8, saes_at_once=16),
        explain=ExplainSettings(num_sequences=2 * blocks, num_held_out_sequences=2 * blocks, batch_blocks=8),
        sized_for_hours=choices.hours,
    )


IMPORTS = """from pathlib import Path

from everyscope.run.config import RunConfig
from everyscope.run.settings import (
    CompareSettings,
    DescribeSettings,
    EvaluateSettings,
    ExplainSettings,
    HarvestSettings,
    SaeGroup,
)
from everyscope.sae.presets import fast
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainSettings
"""
"""What a printed recipe imports."""


def recipe_text(config: RunConfig, choices: UserChoices) -> str:
    """The run as a recipe in Python, to be changed by hand."""
    group, text, wide = config.groups[0], config.text, replace(choices, layers=config.groups[0].layers)
    named = f"dataset={text.dataset!r}, dataset_config={text.dataset_config!r}"
    if text.source == "files":
        named = f"paths=(Path({str(text.paths[0])!r}),)"
    source = f"TextConfig(source={text.source!r}, {named}, shuffle_seed={text.shuffle_seed}, context={text.context})"
    evaluate, describe, explain = config.evaluate, config.describe, config.explain
    passes = group.num_tokens // (config.harvest.num_tokens or group.num_tokens)
    return f'''"""SAEs of {config.model.name}. Check with `everyscope plan FILE.py`, run with `everyscope run FILE.py`."""

{IMPORTS}

def recipe() -> RunConfig:
    """Chosen for about {wide.hours:g} h on this machine."""
    return RunConfig(
        name={config.name!r},  # the run's folder is runs/{config.name}
        title={config.title!r},
        # dtype: the format in which the model is fastest here; device: cpu, cuda or cuda:N
        model=ModelConfig(name={config.model.name!r}, dtype={config.model.dtype!r}, device={config.model.device!r}),
        # text that activations are made of; 5 % of the documents are held out for every number
        text={source},
        groups=(
            SaeGroup(
                sites={group.sites!r},  # of attn_out, mlp_out, resid_post, embed
                layers={group.layers!r},  # of 0 to {config.sizes.num_layers - 1}; None takes all
                widths={group.widths!r},  # latents
                target_l0s={group.target_l0s!r},  # latents that are active on a token, on average
                num_tokens={group.num_tokens:_},  # that each SAE sees, {passes} times what is harvested
            ),
        ),
        preset=fast({config.sizes.d_model}),  # training settings for 10^5 to 10^8 tokens
        harvest=HarvestSettings(
            num_tokens={config.harvest.num_tokens:_}, dtype={config.harvest.dtype!r}, bucket_rows={config.harvest.bucket_rows:_}
        ),
        train=TrainSettings(device={config.train.device!r}, batch_rows={config.train.batch_rows}),
        # blocks of {text.context} tokens: more make scores surer, examples more varied, labels better
        evaluate=EvaluateSettings(
            num_sequences={evaluate.num_sequences},
            batch_blocks=8,
            saes_at_once=16,
            uniformity_sequences=0,
            baseline_sequences={evaluate.baseline_sequences},
        ),
        compare=CompareSettings(slices={config.compare.slices!r}, splitting_sequences={config.compare.splitting_sequences}),
        describe=DescribeSettings(num_sequences={describe.num_sequences}, batch_blocks=8, saes_at_once=16),
        explain=ExplainSettings(
            num_sequences={explain.num_sequences}, num_held_out_sequences={explain.num_held_out_sequences}, batch_blocks=8
        ),
    )
'''
