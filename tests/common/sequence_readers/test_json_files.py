"""JSON as TAPE and ProteinLM write it, against Python's own decoder on the whole file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Record, json_files, lines, open_sequences

TAPE = [
    {"id": "3GEM_B", "primary": "LSSAPI", "protein_length": 6, "tertiary": [[0.1, 2.0]], "more": {"x": '"}]'}},
    {"primary": "ACD", "family": "PF00067.25", "stability_score": [-0.01]},
    {"id": 7, "primary": "MKT", "family": 67, "clan": 3},
]
RECORDS = [
    Record("3GEM_B", "", b"LSSAPI", 2),
    Record("3", "PF00067;", b"ACD", 3),
    Record("7", "", b"MKT", 4),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "file.json"
    path.write_text(text, encoding="utf-8")
    return path


def in_lines(records: list[Any]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"


def test_tapes_list_of_records_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, in_lines(TAPE))
    assert list(open_sequences(path)) == RECORDS
    (block,) = open_sequences(path).blocks()
    assert block.families.tolist() == [-1, 67, -1], "TAPE's own numbers are not Pfam's"


def test_tapes_records_as_lines_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff\n" + "\r\n".join(map(json.dumps, TAPE)) + "\r\n\r\n")
    assert list(open_sequences(path)) == RECORDS


@given(
    records=st.lists(
        st.fixed_dictionaries(
            {"primary": st.text("ACDEF", min_size=1), "id": st.text("ab", min_size=1)},
            optional={
                "more": st.recursive(st.text('"\\{}[],é\n'), st.lists),
                "labels": st.dictionaries(st.text(), st.floats()),
            },
        ),
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
    block_bytes=st.integers(1, 60),
    max_objects=st.integers(1, 3),
)
def test_a_list_in_any_layout_gives_what_decoding_it_whole_gives(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: list[dict[str, Any]],
    indent: int | None,
    is_ascii: bool,
    block_bytes: int,
    max_objects: int,
) -> None:
    monkeypatch.setattr(json_files, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(json_files, "_MAX_OBJECTS", max_objects)
    text = json.dumps(records, indent=indent, ensure_ascii=is_ascii)
    read = list(open_sequences(write(tmp_path, text), "tape_json"))
    assert [(record.identifier, record.sequence.decode()) for record in read] == [
        (record["id"], record["primary"]) for record in records
    ]
    if indent is not None:
        rows = text.encode().split(b"\n")
        opening = [number for number, row in enumerate(rows, start=1) if row == b" " * indent + b"{"]
        assert [record.line for record in read] == opening


@given(sequences=st.lists(st.text("ACDEF", min_size=1), min_size=1, max_size=6), block_bytes=st.integers(3, 40))
def test_proteinlms_lines_lose_the_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequences: list[str], block_bytes: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    path = write(tmp_path, "".join(json.dumps({"text": " ".join(sequence)}) + "\n" for sequence in sequences))
    assert list(open_sequences(path)) == [
        Record(str(number), "", sequence.encode(), number) for number, sequence in enumerate(sequences, start=1)
    ]


BAD_TAPE = [
    ({"id": "x"}, "the record has no 'primary', only 'id'"),
    ({}, "the record has no 'primary', only nothing"),
    ({"id": "x", "primary": ["A", "C"]}, "the record's 'primary' is not text"),
    ({"id": "x", "primary": ""}, "record 'x' has no sequence"),
    ({"id": "", "primary": "ACD"}, "the record has no identifier"),
    ({"id": ["x"], "primary": "ACD"}, "its 'id' is neither text nor a number"),
    ({"id": "x", "primary": "A\0D"}, "the record holds binary data"),
]


@pytest.mark.parametrize("layout", ["list", "lines"])
@pytest.mark.parametrize(("record", "said"), BAD_TAPE)
def test_a_bad_record_is_reported_with_its_line_and_skipped(
    tmp_path: Path, record: dict[str, Any], said: str, layout: str
) -> None:
    records = [TAPE[0], record, TAPE[2]]
    path = write(tmp_path, in_lines(records) if layout == "list" else "\n" + "\n".join(map(json.dumps, records)))
    messages: list[str] = []
    assert list(open_sequences(path, "tape_json", on_bad_record=messages.append)) == [RECORDS[0], RECORDS[2]]
    assert messages == [f"{path}:3: {said}"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "A C}', "the record is not valid JSON (Unterminated string"),
        ('{"text": ' + "[" * 100_000, "the record is not valid JSON (maximum recursion depth"),
        ('"A C D"', "the record is not an object with keys"),
        ('{"primary": "ACD"}', "the record has no 'text', only 'primary'"),
        ('{"text": "  "}', "record '2' has no sequence"),
    ],
)
def test_a_malformed_line_is_fatal_or_skipped_as_asked(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path, f'{{"text": "A C"}}\n{line}\n{{"text": "D"}}\n')
    messages: list[str] = []
    read = list(open_sequences(path, on_bad_record=messages.append))
    assert [record.sequence for record in read] == [b"AC", b"D"]
    assert [message.startswith(f"{path}:2: {said}") for message in messages] == [True]
    with pytest.raises(InputError, match=r"file\.json:2: .* correct it, or skip such records"):
        list(open_sequences(path))


def test_a_malformed_object_of_a_list_does_not_hide_the_next(tmp_path: Path) -> None:
    path = write(tmp_path, '[{"primary": "AC"},\n{"primary": nothing},\n{"primary": "D"}]')
    messages: list[str] = []
    read = list(open_sequences(path, on_bad_record=messages.append))
    assert [(record.sequence, record.line) for record in read] == [(b"AC", 1), (b"D", 3)]
    assert messages == [f"{path}:2: the record is not valid JSON (Expecting value)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (in_lines(TAPE)[:-3], ":4: the list has no end: the file is truncated"),
        (in_lines(TAPE)[:60], ":2: the list has no end: the file is truncated"),
        ('[{"primary": "A"}]\n{"primary": "B"}', ":1: more stands behind the list's end"),
        ('[{"primary": "A"},\n3]', ":2: the list holds something else than objects"),
        ("[]", ": is empty"),
        ("\n", ": is empty"),
    ],
)
def test_a_broken_list_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        list(open_sequences(path, "tape_json"))
    assert str(caught.value).startswith(f"{path}{said}")


def test_an_object_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "BLOCK_BYTES", 100)
    monkeypatch.setattr(json_files, "MAX_OBJECT_BYTES", 1000)
    with pytest.raises(InputError, match=r"file\.json:1: the list has no end"):
        list(open_sequences(write(tmp_path, '[{"primary": "' + "A" * 10_000 + '"}]')))
