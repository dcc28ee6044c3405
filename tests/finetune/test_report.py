"""The report: one page that opens offline, with every number, and JSON that any reader takes."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megaprot.finetune import figures
from megaprot.finetune.metrics import Metric
from megaprot.finetune.published import PUBLISHED, published_for
from megaprot.finetune.report import Report, page, write_report
from megaprot.finetune.tasks import task_names


class Tags(HTMLParser):
    """Collects tags and their attributes, and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.open[-1]:
            self.open.pop()


def report(task: str = "fluorescence", split: str = "test") -> Report:
    metrics = {"spearman": Metric(0.61234, 0.6, 0.63), "pearson": Metric(math.nan, math.nan, math.nan)}
    measured = np.linspace(0, 1, 50)
    return Report(
        task, split, 50, metrics, {"spearman": "Ranks <&> all."}, "proteins", ["model <x>"],
        [("Scatter", figures.scatter(measured, measured**2))], {"models": ["runs/x"]},
    )  # fmt: skip


def test_the_page_opens_offline_and_holds_numbers_figures_and_published_rows() -> None:
    text = page(report())
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert [str(attributes["src"])[:22] for tag, attributes in tags.found if tag == "img"] == ["data:image/png;base64,"]
    assert not any("href" in attributes or str(attributes.get("src", "data:")).startswith("http")
                   for _, attributes in tags.found)  # fmt: skip
    for part in ("0.6123", "0.6000 to 0.6300", "Ranks &lt;&amp;&gt; all.", "model &lt;x&gt;", "ProteinLM 3B", "UniRep"):
        assert part in text
    assert "this model" in text  # its row stands beside those of the same metric
    assert "medium and long range" not in text
    assert "medium and long range" in page(report("contact_prediction"))
    assert "published" not in page(report("sequence_regression"))


def test_results_are_strict_json(tmp_path: Path) -> None:
    write_report(tmp_path / "new", report())
    found = json.loads((tmp_path / "new" / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["metrics"]["spearman"] == {"value": 0.61234, "low": 0.6, "high": 0.63}
    assert found["metrics"]["pearson"] == {"value": None, "low": None, "high": None}
    assert (found["task"], found["split"], found["num_examples"], found["models"]) == (
        "fluorescence",
        "test",
        50,
        ["runs/x"],
    )


def test_published_numbers_name_tasks_and_splits() -> None:
    assert {one.task for one in PUBLISHED} <= set(task_names())
    best = {one.model: one.value for one in published_for("stability")}
    assert (best["ProteinLM 3B"], best["Transformer"]) == (0.79, 0.73)
    assert "one-hot + alignment" not in best
    assert all(0 < one.value < 1 and one.split and one.source for one in PUBLISHED)


@pytest.mark.parametrize("num_classes", [3, 12, 60])
def test_figures_of_many_sizes_can_be_drawn(num_classes: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 9, (num_classes, num_classes)).astype(float)
    figures.confusion(counts, [f"c{number}" for number in range(num_classes)]).savefig(tmp_path / "a.png")
    values = random.normal(size=num_classes * 100)
    figures.scatter(values, values).savefig(tmp_path / "b.png")
    labels = random.integers(-1, 2, (num_classes, num_classes))
    figures.contact_maps(labels, random.random((num_classes, num_classes))).savefig(tmp_path / "c.png")
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "valid_loss": None, "valid_accuracy": 0.5}, {"step": 2, "loss": 1.0}]
    figures.curves(rows, "accuracy").savefig(tmp_path / "d.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abcd")
