"""The examples run: what a reader copies works."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_scope import random_sae

import everyscope
from everyscope.sites.names import Site

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_sae_is_trained_looked_through_and_switched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "train_and_edit.py"))["main"]("tiny", layer=1, num_documents=6, num_passes=3)
    lines = capsys.readouterr().out.splitlines()
    sae = everyscope.load_sae("runs/example_sae")
    assert (sae.metadata.site, sae.metadata.model) == (Site("resid_post", 1), "tiny")
    assert repr(sae) in lines
    assert lines[-1].startswith("without latent")


def test_reconstructions_are_written_of_every_sae(tmp_path: Path):
    """Its other half, `compare_in_saelens.py`, runs where sae-lens is installed."""
    example = runpy.run_path(str(EXAMPLES / "write_reconstructions.py"))
    entries = []
    for site in (Site("resid_post", 1), Site("attn_out", 2)):
        d_in = 160 if site.kind == "attn_out" else 128
        sae = random_sae(d_in, 64, 0.5, torch.zeros(d_in), seed=0)
        entries.append(SimpleNamespace(site=site, folder=tmp_path / site.folder, sae=lambda sae=sae: sae))
    example["main"].__globals__["load_suite"] = lambda folder: FakeSuite(SimpleNamespace(model="tiny"), entries)
    example["main"](tmp_path, tmp_path / "out.npz")
    arrays = np.load(tmp_path / "out.npz")
    for entry in entries:
        x = torch.from_numpy(arrays[f"{entry.site.folder}/x"])
        assert x.abs().sum() > 0
        assert torch.equal(torch.from_numpy(arrays[f"{entry.site.folder}/x_hat"]), entry.sae()(x))


class FakeSuite(list):
    """A suite's entries, without its files."""

    def __init__(self, index: SimpleNamespace, entries: list[SimpleNamespace]) -> None:
        super().__init__(entries)
        self.index = index  # pyright: ignore[reportAttributeAccessIssue]
