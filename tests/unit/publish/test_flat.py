import json
import re
from pathlib import Path

import pyarrow.parquet

from everyscope.publish.config import PublishConfig
from everyscope.suite.reader import load_suite

ROOT = Path(__file__).parents[3]


def test_the_table_has_a_row_for_each_sae_and_every_number(published: PublishConfig):
    table = pyarrow.parquet.read_table(published.out / "table.parquet").to_pylist()
    suite = load_suite(published.out)
    assert [row["folder"] for row in table] == [entry.record.folder for entry in suite]
    for row, entry in zip(table, suite, strict=True):
        metrics = json.loads((entry.folder / "metrics.json").read_text())
        assert row["is_canonical"] == entry.metrics.is_canonical
        assert row["training_tokens"] == 1000
        for name, value in metrics.items():
            if not isinstance(value, dict | list) and name not in ("evaluation", "by_segment", "identity", "weights_sha256"):
                assert row[name] == value
        assert [row["fvu_low"], row["fvu_high"]] == metrics["intervals"]["fvu"]
        assert row["loss_recovered_low"] is None
        assert row["baseline_pca_delta_loss"] == metrics["baselines"]["pca"]["delta_loss"]
        assert row["uniformity_r_l0"] == metrics["uniformity"]["r_l0"]
        assert row["precision_model"] == "float32"


def test_every_column_is_documented(published: PublishConfig):
    text = re.sub(r"```.*?```", "", (ROOT / "docs/reference/table.md").read_text(), flags=re.DOTALL)
    documented = set(re.findall(r"`([^`]+)`", text))
    for name in pyarrow.parquet.read_schema(published.out / "table.parquet").names:
        parts = re.sub(r"^(baseline)_(zero|mean|pca|random_dictionary|neuron_basis)_", r"\1_<name>_", name)
        parts = re.sub(
            r"^(l0|fvu|fvu_usual|delta_loss|delta_loss_zero|delta_loss_mean|kl|loss_recovered|cosine)_(low|high)$",
            r"<metric>_\2",
            parts,
        )
        assert parts in documented, name
