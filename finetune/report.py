"""``results.json`` and ``report.html``: one file that opens offline, with numbers, figures and what they mean."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprot.common.files import atomic_write, write_json_atomically
from megaprot.finetune.metrics import Metric
from megaprot.finetune.published import NOTES, published_for

_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}.note{color:#555}"""


@dataclass(frozen=True)
class Section:
    """What a task reports beside its metrics.

    Attributes:
        key: Its name in ``results.json``.
        title: Its heading in ``report.html``.
        header: Columns of its table.
        rows: Cells of its table.
        notes: Sentences below it.
        numbers: The same for ``results.json``.
    """

    key: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    numbers: Any


@dataclass(frozen=True)
class Report:
    """What is reported of one model on one split.

    Attributes:
        task: Name of the task.
        split: Name of the split.
        num_examples: Its examples, all of them.
        metrics: {name: value and interval}.
        definitions: {name: what it is}.
        unit: What the examples are called.
        about: Lines on model and data.
        figures: (title, matplotlib figure).
        details: More for ``results.json``: model, data, values by seed.
        sections: What the task reports beside its metrics.
    """

    task: str
    split: str
    num_examples: int
    metrics: dict[str, Metric]
    definitions: dict[str, str]
    unit: str
    about: Sequence[str]
    figures: Sequence[tuple[str, Any]]
    details: dict[str, Any]
    sections: Sequence[Section] = ()


def write_report(folder: Path, report: Report) -> None:
    """Write ``results.json`` and ``report.html`` into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / "results.json", results(report))
    with atomic_write(folder / "report.html") as stream:
        stream.write(page(report).encode())


def results(report: Report) -> dict[str, Any]:
    """Return a report's numbers as JSON can hold them; what is not finite is null."""
    return {
        "task": report.task,
        "split": report.split,
        "num_examples": report.num_examples,
        "metrics": plain_metrics(report.metrics),
        "definitions": report.definitions,
        **report.details,
        **{section.key: section.numbers for section in report.sections},
    }


def plain_metrics(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | None]]:
    """Return metrics as JSON can hold them; what is not finite is null."""
    return {
        name: {"value": _plain(one.value), "low": _plain(one.low), "high": _plain(one.high)}
        for name, one in metrics.items()
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def page(report: Report) -> str:
    """Return a report as one HTML page, its figures within."""
    title = f"{report.task} on {report.split}"
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in report.about)]
    rows = [
        (name, f"{one.value:.4f}", f"{one.low:.4f} to {one.high:.4f}", report.definitions.get(name, ""))
        for name, one in report.metrics.items()
    ]
    parts.append(f"<h2>Metrics over {report.num_examples:,} {report.unit}</h2>")
    parts.append(_table(("metric", "value", "95 % interval", "definition"), rows))
    parts.append(f'<p class="note">Intervals: bootstrap over {report.unit}, 1,000 samples.</p>')
    for section in report.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>" + _table(section.header, section.rows))
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
    parts += _published(report)
    for name, figure in report.figures:
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="{_image(figure)}">')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _published(report: Report) -> list[str]:
    """Return the table of published numbers, this model's first where split and definition are the same."""
    numbers = published_for(report.task)
    if not numbers:
        return []
    rows = []
    for metric in dict.fromkeys(number.metric for number in numbers):
        if metric in report.metrics:
            rows.append(("this model", f"{report.metrics[metric].value:.3f}", report.split, metric, ""))
    rows += [
        (number.model, f"{number.value:.2f}", number.split, number.metric or "see below", number.source)
        for number in numbers
    ]
    parts = ["<h2>Beside published numbers</h2>", _table(("model", "value", "split", "metric", "source"), rows)]
    parts.append('<p class="note">Only numbers of one split and one definition can be compared; the training data of '
                 "this model may differ from theirs.</p>")  # fmt: skip
    if report.task in NOTES:
        parts.append(f'<p class="note">{html.escape(NOTES[report.task])}</p>')
    return parts


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the second column holds numbers."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        cells = [
            f"<td{' class=number' if place == 1 else ''}>{html.escape(cell)}</td>" for place, cell in enumerate(row)
        ]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _image(figure: Any) -> str:
    """Return a matplotlib figure as a PNG in a data address."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
