"""`megaprot plot`: what is drawn, the formats it is written in, and what it says to wrong input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from megaprot.tools import cli

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": None},  # a step that was skipped
    {"step": 2, "validation_loss": 2.9, "validation_mask_perplexity": 18.0},
    {"step": 3, "loss": 2.5},
    {"step": 4, "validation_loss": 2.4, "validation_mask_perplexity": 11.0},
]
BEGINNINGS = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}
Curves = dict[str, tuple[list[float], list[float]]]


def write_run(folder: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that were drawn, kept open until the end of the test."""
    figures: list[Figure] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def curves(figure: Figure, side: int) -> Curves:
    """{label: (steps, values)} of the left (0) or right (1) half."""
    lines: list[Any] = list(figure.axes[side].get_lines())
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert cli.main(["plot", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megaprot plot: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_each_format_is_written_whole(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / f"loss.{suffix}"
    assert cli.main(["plot", "--run", write_run(tmp_path / "run"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"written to {output}\n"
    content = output.read_bytes()
    assert content.startswith(BEGINNINGS[suffix])
    assert len(content) > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, "run"]


def test_curves_are_the_rows_without_gaps(tmp_path: Path, drawn: list[Figure]) -> None:
    flags = ["--run", write_run(tmp_path / "run"), "--output", str(tmp_path / "a.svg"), "--baseline", "17.6"]
    assert cli.main(["plot", *flags]) == 0
    assert curves(drawn[0], 0) == {"training": ([1, 3], [3.0, 2.5]), "validation": ([2, 4], [2.9, 2.4])}
    right = curves(drawn[0], 1)
    assert right["model"] == ([2, 4], [18.0, 11.0])
    assert right["residue frequencies (17.60)"][1] == [17.6, 17.6]
    for side in (0, 1):
        assert drawn[0].axes[side].get_xlabel() == "optimizer step"
        assert drawn[0].axes[side].get_ylabel()
        assert drawn[0].axes[side].get_legend() is not None


def test_several_runs_are_told_apart_by_name_or_by_path(tmp_path: Path, drawn: list[Figure]) -> None:
    one = write_run(tmp_path / "first" / "small")
    two = write_run(tmp_path / "second" / "small", [{"step": 9, "loss": 1.0}])
    three = write_run(tmp_path / "large", [{"step": 8, "loss": 1.5}])
    assert cli.main(["plot", "--run", one, two, three, "--output", str(tmp_path / "a.svg")]) == 0
    left = curves(drawn[0], 0)
    assert left[f"{one} training"][0] == [1, 3]
    assert left[f"{two} training"] == ([9], [1.0])
    assert left["large training"] == ([8], [1.5])
    colours = {line.get_color() for line in drawn[0].axes[0].get_lines()}
    assert len(colours) == 3


def test_a_run_without_validation_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 3.0}])
    assert cli.main(["plot", "--run", run, "--output", str(tmp_path / "a.png")]) == 0
    assert curves(drawn[0], 0)["validation"] == ([], [])


def test_wrong_input_is_one_sentence_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = write_run(tmp_path / "run"), write_run(tmp_path / "empty", [])
    output = str(tmp_path / "loss.png")
    assert "--run is not given" in refused(capsys, "--output", output)
    assert "loss.jpeg must end in .png, .svg or .pdf" in refused(capsys, "--run", run, "--output", "loss.jpeg")
    assert f"the folder {tmp_path}/no does not exist" in refused(
        capsys, "--run", run, "--output", f"{tmp_path}/no/a.png"
    )
    assert f"{empty}/metrics.jsonl holds no numbers yet" in refused(capsys, "--run", run, empty, "--output", output)
    assert "absent/metrics.jsonl holds no numbers" in refused(capsys, "--run", f"{tmp_path}/absent", "--output", output)
    assert "--baseline must be a number" in refused(capsys, "--run", run, "--output", output, "--baseline", "low")
    assert not list(tmp_path.glob("*.png"))
