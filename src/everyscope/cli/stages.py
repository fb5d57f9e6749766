"""What a run is going to do, as --dry-run shows it, and what it made. Torch-free."""

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from everyscope.base.files import human_bytes
from everyscope.base.progress import human_count
from everyscope.run.stages import Stages
from everyscope.train.config import TrainConfig
from everyscope.train.memory import bytes_of


def show_stages(stages: Stages, is_json: bool) -> None:
    """What a run would do, stage by stage."""
    if is_json:
        print(json.dumps(stages.as_json(), indent=2))
        return
    table = Table(title=f"{stages.config.name}: checked, nothing written", title_justify="left", box=box.SIMPLE)
    table.add_column("stage")
    table.add_column("what it does")
    for part in stages.parts:
        sites = f"{human_count(part.harvest.num_tokens)} rows at each of {len(part.harvest.sites)} sites"
        table.add_row("harvest", f"{sites} of {part.config.model.name}, in {part.harvest.dtype}")
    for kind, groups in by_settings(stages).items():
        largest = max(bytes_of(group, stages.d_in(group)) for group in groups)
        saes = sum(len(group.saes) for group in groups)
        table.add_row("train", f"{saes} SAEs in {len(groups)} groups on {kind}; the largest needs {human_bytes(largest)} of each")
    table.add_row("evaluate", f"{stages.parts[0].evaluate.num_sequences} held-out blocks")
    for comparison in stages.comparisons:
        table.add_row("compare", type(comparison).__name__.removesuffix("Config"))
    table.add_row("describe", f"{stages.describe.num_sequences} blocks")
    table.add_row("explain", f"{stages.explain.num_sequences} blocks, SAEs {stages.explain.saes}")
    table.add_row("publish", str(stages.publish.out))
    Console().print(table)


def by_settings(stages: Stages) -> dict[str, list[TrainConfig]]:
    """Training groups by where each trains."""
    found: dict[str, list[TrainConfig]] = {}
    for group in stages.groups:
        settings = group.settings
        ranks = "" if settings.ranks == 1 else f", {settings.latent_shards} shards x {settings.replicas} replicas"
        found.setdefault(f"{settings.device}{ranks}", []).append(group)
    return found


def show_suite(suite: Path, is_json: bool, is_line: bool = False) -> None:
    """The suite's table on standard output, or its index as JSON (as the last of several lines, or indented), and what to type
    next.
    """
    from everyscope.publish.table import suite_table
    from everyscope.suite.records import read_index

    index = read_index(suite)
    if is_json:
        print(json.dumps({"event": "suite"} | index.as_json()) if is_line else json.dumps(index.as_json(), indent=2))
        return
    console = Console()
    console.print(suite_table(index))
    first = suite / index.saes[0].folder
    console.print(f"\nSuite   {suite}\nReport  {suite / 'report' / 'index.html'}\n", highlight=False)
    console.print(f"Next    everyscope browse {suite}", highlight=False, soft_wrap=True)
    console.print(f"        everyscope verify {suite}", highlight=False, soft_wrap=True)
    console.print(
        f"        python -c \"import everyscope; print(everyscope.load_sae('{first}'))\"", highlight=False, soft_wrap=True
    )
