"""What a harvest of every site costs beyond the model's own forward pass, on the bundled model.

    python benchmarks/harvest.py                    rounds of: the bare pass, the harvest, the same bytes to the disk
    python benchmarks/harvest.py --quick            few tokens, to see that it runs

Bare is the model without its head and without hooks, over the same blocks in the same batches, nothing kept: capture stops before
the head too. Disk is a file of as many bytes as the shards have, written and seen to the disk (fsync) by itself. The harvest is
timed as a user waits for it, loading the model left out. Prints a table and where the time went; results.json lies in --out.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from training import device

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.run import run as harvest
from everyscope.activations.shards.reader import TokenBlocks
from everyscope.base.files import make_folder, write_json
from everyscope.run.find import find_recipe
from everyscope.sites.model import load_language_model

CHUNK_BYTES = 64 << 20
"""Bytes written to the bare file at a time [bytes]."""


def config_of(options: argparse.Namespace) -> HarvestConfig:
    """The recipe's own harvest, of fewer tokens, in a folder that each round creates again."""
    recipe = find_recipe(options.recipe)
    return recipe.harvest_config(options.out).model_copy(update={"num_tokens": options.tokens, "out": options.out / "shards"})


def time_harvest(config: HarvestConfig) -> dict[str, float]:
    """Seconds of a harvest from nothing, and of its parts."""
    shutil.rmtree(config.out, ignore_errors=True)
    start = time.perf_counter()
    result = harvest(config)
    seconds = time.perf_counter() - start
    parts = {"disk_seconds" if part == "disk" else part: spent for part, spent in result.seconds.items()}
    return {"whole": seconds - result.seconds["load"], **parts}


def time_forward(model: torch.nn.Module, blocks: torch.Tensor, batch_blocks: int) -> float:
    """Seconds of the bare pass over all blocks."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in blocks.split(batch_blocks):
            model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


def time_disk(path: Path, num_bytes: int) -> float:
    """Seconds to write `num_bytes` and see them to the disk."""
    chunk = np.random.default_rng(0).integers(0, 255, CHUNK_BYTES, np.uint8)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for begin in range(0, num_bytes, CHUNK_BYTES):
            file.write(chunk[: num_bytes - begin].data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a round; the first round, which warms up, is left out."""
    config, records = config_of(options), []
    whole: Any = load_language_model(config.model).model
    model = whole.get_decoder()
    time_harvest(config)
    tokens = TokenBlocks(config.out / "tokens")
    blocks = tokens.input_ids(0, tokens.num_blocks).long()
    num_bytes = sum(path.stat().st_size for path in config.out.rglob("*.safetensors"))
    for number in range(-1, options.rounds):
        record: dict[str, Any] = {"bytes": num_bytes, "blocks": len(blocks)}
        steps = ("bare", "harvest", "disk") if number % 2 else ("disk", "harvest", "bare")
        for step in steps:
            if step == "bare":
                record["bare"] = time_forward(model, blocks, config.batch_blocks)
            elif step == "disk":
                record["disk"] = time_disk(options.out / "bare.bin", num_bytes)
            else:
                record |= time_harvest(config)
        record["ratio"] = record["whole"] / (record["bare"] + record["disk"])
        records += [record] if number >= 0 else []
    return records


def table_of(records: list[dict[str, Any]], title: str) -> Table:
    """Medians and ranges for people."""
    table = Table("what [s]", "median", "range", title=title)
    names = {
        "bare": "bare forward pass",
        "disk": "the same bytes to the disk",
        "whole": "harvest of all sites",
        "ratio": "harvest / (forward + disk)",
        "forward": "  of it: the model with its hooks",
        "text": "  of it: waiting for tokens",
        "wait": "  of it: shuffle and statistics",
        "commit": "  of it: checksums, writing out, waiting for the disk",
        "disk_seconds": "  beside the model: the disk",
    }
    for name, title in names.items():
        values = [record[name] for record in records]
        table.add_row(title, f"{statistics.median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="whose model and sites are harvested")
    parser.add_argument("--tokens", type=int, default=1 << 17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache" / "harvest")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = 4096, 1
    make_folder(options.out)
    records = measure(options)
    console = Console() if sys.stdout.isatty() else Console(width=130)
    console.print(table_of(records, f"{options.recipe}, every site, {options.tokens} tokens, {records[0]['bytes'] / 1e9:.2f} GB"))
    results = {"device": device(), "command": shlex.join(sys.argv), "torch": torch.__version__, "rounds": records}
    write_json(options.out / "results.json", json.loads(json.dumps(results)))
    console.print(f"{device()['processor']}, {os.cpu_count()} cores; {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
