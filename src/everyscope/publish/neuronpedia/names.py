"""Neuronpedia's names of our SAEs.

A *source* is one SAE, and its id is `{layer}-{set}`; SAEs of one site and width are a *source set*, so that of the suite's SAEs
at layer 20 after the block with 16k latents the canonical one becomes 20-gemmascope-res-16k. One set has one such source a layer:
SAEs of other L0s follow it as 20-gemmascope-res-16k__l0-71. The embedding's layer is called e.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from everyscope.base.errors import ConfigError, DataError
from everyscope.publish.neuronpedia.config import MODEL_NAME, NAME, NeuronpediaConfig
from everyscope.sites.names import SiteKind
from everyscope.suite.layout import width_label
from everyscope.suite.records import SaeRecord, SuiteIndex

SITE_WORDS: dict[SiteKind, str] = {
    "attn_out": "att",
    "mlp_out": "mlp",
    "resid_post": "res",
    "embed": "emb",
    "mlp_in": "mlpin",
    "resid_mid": "resmid",
    "transcoder": "transcoder",
    "resid_transcoder": "residtranscoder",
}
"""Our sites as the names of Gemma Scope's source sets have them."""
DESCRIPTIONS: dict[SiteKind, str] = {
    "attn_out": "Attention Out",
    "mlp_out": "MLP Out",
    "resid_post": "Residual Stream",
    "embed": "Embedding",
    "mlp_in": "MLP In",
    "resid_mid": "Residual Stream Mid",
    "transcoder": "Transcoder",
    "resid_transcoder": "Residual Transcoder",
}
"""Our sites as their descriptions have them."""


@dataclass(frozen=True)
class NeuronpediaSource:
    """One SAE under Neuronpedia's names."""

    record: SaeRecord
    model_id: str
    set_name: str
    id: str

    @property
    def is_for_api(self) -> bool:
        """Whether the API can take it: with a set it makes one source for each layer, and no others."""
        return self.record.metrics.is_canonical and self.record.site != "embed"

    @property
    def description(self) -> str:
        """What its set is, for people, as in Residual Stream - 16k."""
        return f"{DESCRIPTIONS[self.record.site]} - {width_label(self.record.width)}"


def sources_of(config: NeuronpediaConfig, index: SuiteIndex) -> tuple[NeuronpediaSource, ...]:
    """The SAEs that go to Neuronpedia, in the suite's order.

    ConfigError where nothing matches, or a name cannot be made of the suite's; DataError where two would get one id.
    """
    model_id, prefix = model_id_of(config, index), set_prefix(config, index)
    found = [_source(record, model_id, prefix) for record in index.saes if fnmatchcase(record.folder, config.saes)]
    if not found:
        raise ConfigError(f"saes={config.saes!r} matches none of {len(index.saes)} SAEs, as {index.saes[0].folder}; set --saes")
    ids = [source.id for source in found]
    doubled = next((id_ for id_ in ids if ids.count(id_) > 1), None)
    if doubled is not None:
        raise DataError(f"two SAEs of the suite would both be source {doubled}; publish the suite again, or narrow --saes")
    return tuple(found)


def _source(record: SaeRecord, model_id: str, prefix: str) -> NeuronpediaSource:
    set_name = f"{prefix}-{SITE_WORDS[record.site]}-{width_label(record.width)}"
    layer = "e" if record.site == "embed" else str(record.layer)
    # The folder, not the number, is unique: two L0s may round to one, and their folders tell them apart.
    l0 = record.folder.rpartition("/average_l0_")[2].replace("_", "-")
    suffix = "" if record.metrics.is_canonical else f"__l0-{l0}"
    return NeuronpediaSource(record, model_id, set_name, f"{layer}-{set_name}{suffix}")


def model_id_of(config: NeuronpediaConfig, index: SuiteIndex) -> str:
    """The model's id: as configured, or the last part of its name in the suite, in lower case."""
    if config.model_id is not None:
        return config.model_id
    name = re.sub(r"[^a-z0-9.]+", "-", index.model.rstrip("/").rpartition("/")[2].lower()).strip("-.")
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(f"no model id can be made of {index.model!r}; give one, as in --model-id gemma-2-2b")
    return name


def set_prefix(config: NeuronpediaConfig, index: SuiteIndex) -> str:
    """What set names begin with: as configured, or the suite's title in lower case with dashes."""
    if config.set is not None:
        return config.set
    name = re.sub(r"[^a-z0-9]+", "-", index.title.lower()).strip("-")
    if not NAME.fullmatch(name):
        raise ConfigError(f"no source set's name can be made of the title {index.title!r}; give one, as in --set gemmascope")
    return name


def one_per_set(sources: Sequence[NeuronpediaSource]) -> list[NeuronpediaSource]:
    """A source of each set, in order."""
    return list({source.set_name: source for source in reversed(sources)}.values())[::-1]
