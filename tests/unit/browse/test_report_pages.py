"""The report among the pages: its rows lead to SAEs, and whatever it is, it is kept apart."""

import re
import shutil
from pathlib import Path

import numpy as np
from browser.asking import ask

from everyscope.browse.app import Browser
from everyscope.browse.config import ExportConfig
from everyscope.browse.export import run
from everyscope.browse.pages import static_files
from everyscope.browse.preparation import Preparation
from everyscope.publish.drawing.palette import layer_colours

SAE = "resid_post/layer_1/width_256/average_l0_11"
REPORT = f'<!doctype html><html><head></head><body><main><a href="../{SAE}/">row</a><script>1</script></main></body>'


def with_report(suite: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(suite, folder))
    (copy / "report").mkdir()
    (copy / "report/index.html").write_text(REPORT)
    (copy / "report/figure.png").write_bytes(b"\x89PNG")
    (copy / "report/secret.txt").write_text("not ours")
    return copy


def test_the_report_is_served_in_a_sandbox(suite: Path, tmp_path: Path):
    preparation = Preparation(with_report(suite, tmp_path / "suite"), tmp_path / "cache")
    app = Browser(preparation, None).app()
    assert 'href="/report/"' in ask(app, "/").text
    answer = ask(app, "/report/")
    assert f'href="/sae/{SAE}/"' in answer.text
    assert '<a href="/">Pages of' in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox ")
    assert "allow-same-origin" not in policy
    assert "default-src 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask(app, "/report/figure.png").headers["content-type"] == "image/png"
    for name in ("secret.txt", "..%2fsuite.json", "nothing.html"):
        assert ask(app, f"/report/{name}").status == 404
    assert ask(app, f"/sae/{SAE}/").headers["content-security-policy"].startswith("default-src 'self'")


def test_without_a_report_nothing_leads_to_one(suite: Path, tmp_path: Path):
    app = Browser(Preparation(suite, tmp_path / "cache"), None).app()
    assert "/report/" not in ask(app, "/").text
    assert ask(app, "/report/").status == 404


def test_the_exported_report_has_no_script_and_leads_to_files(suite: Path, tmp_path: Path):
    copy = with_report(suite, tmp_path / "suite")
    run(ExportConfig(suite=copy, out=tmp_path / "pages", max_latents=1, cache=tmp_path / "cache"))
    page = (tmp_path / "pages/report/index.html").read_text()
    assert page.startswith('<!doctype html><meta http-equiv="Content-Security-Policy"')
    assert "script-src" not in page.partition(">")[2].partition(">")[0]  # so that default-src forbids them
    for link in re.findall(r'href="([^"]*)"', page):
        assert (tmp_path / "pages/report" / link).resolve().is_file(), link
    assert (tmp_path / "pages/report/figure.png").read_bytes() == b"\x89PNG"
    assert not (tmp_path / "pages/report/secret.txt").exists()
    assert 'href="report/index.html"' in (tmp_path / "pages/index.html").read_text()


def layers_of_pages() -> list[str]:
    return re.findall(r"\.l\d+ \{ --layer: (#\w{6}); \}", static_files()["style.css"].decode())


def test_pages_and_report_have_one_palette_of_layers():
    assert layers_of_pages() == list(layer_colours(range(12)).values())


def test_layers_keep_their_order_for_red_green_blind_eyes():
    """As deuteranopes and protanopes see the colours (Machado, Oliveira and Fernandes 2009, severity 1), in linear RGB."""
    rgb = np.array([[int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)] for colour in layers_of_pages()])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in (
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ):
        seen = linear @ np.array(matrix).T
        along = np.linalg.norm(seen - seen[0], axis=1)
        assert (np.diff(along) > 0.03).all()
        assert along[-1] > 0.4
