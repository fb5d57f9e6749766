"""Which transcoder of a suite stands for each layer. Torch-free."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from everyscope.base.errors import ConfigError
from everyscope.publish.circuit_tracer.config import CircuitTracerConfig
from everyscope.suite.records import SaeRecord, SuiteIndex

SITE = "transcoder"


def chosen(config: CircuitTracerConfig, index: SuiteIndex, num_layers: int) -> list[SaeRecord]:
    """One transcoder for each of the model's layers, all of one width; ConfigError where a layer has none."""
    found = [record for record in index.saes if record.site == SITE and fnmatchcase(record.name, config.saes)]
    if not found:
        kinds = ", ".join(sorted({record.site for record in index.saes}))
        named = "" if config.saes == "*" else f" with a name like {config.saes}"
        raise ConfigError(
            f"the suite has no transcoder{named}, only SAEs of {kinds}; train at the site transcoder, or change --saes"
        )
    widths = sorted({record.width for record in found})
    if config.width not in (None, *widths) or (config.width is None and len(widths) > 1):
        raise ConfigError(f"the transcoders have widths {', '.join(map(str, widths))}; choose one with --width")
    found = [record for record in found if config.width in (None, record.width)]
    by_layer = {layer: [record for record in found if record.layer == layer] for layer in range(num_layers)}
    if missing := [layer for layer, records in by_layer.items() if not records]:
        raise ConfigError(
            f"circuit-tracer needs a transcoder of each of the model's {num_layers} layers; there is none of width "
            f"{found[0].width} for layers {', '.join(map(str, missing))}: train those too"
        )
    return [_one(config, records) for records in by_layer.values()]


def _one(config: CircuitTracerConfig, records: Sequence[SaeRecord]) -> SaeRecord:
    if config.l0 is None:
        return min(records, key=lambda record: not record.metrics.is_canonical)
    wanted = config.l0
    return min(records, key=lambda record: abs(record.metrics.l0 - wanted))
