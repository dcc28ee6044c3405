"""The Stockholm reader on alignments written by hand and at random, interleaved and broken ones among them."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Record, lines, open_sequences, stockholm

PFAM = b"""# STOCKHOLM 1.0
#=GF ID   1-cysPrx_C
#=GF AC   PF10417.12
#=GF DE   C-terminal domain of 1-Cys peroxiredoxin
#=GS Q9Y7F0/158-193  AC Q9Y7F0.1
Q9Y7F0/158-193      AFQ..fTEKY
#=GR Q9Y7F0/158-193 SS HHHHHHHHHH
Q63716/162-197      -FQF.-.DK.
#=GC SS_cons        HHHHHHHHHH
//
# STOCKHOLM 1.0
#=GF ID   other
#=GF AC   RF00001.1
x/1-2  A.C
//
"""
INTERLEAVED = b"""# STOCKHOLM 1.0

a  AC-
b  .D.

#=GC x  HH
a  DE
b  -F
//
"""


def write(folder: Path, content: bytes) -> Path:
    path = folder / "file.sto"
    path.write_bytes(content)
    return path


def read(path: Path) -> list[tuple[str, bytes, int]]:
    return [(record.identifier, record.sequence, record.line) for record in open_sequences(path)]


@pytest.mark.parametrize("stored", [PFAM, gzip.compress(PFAM), PFAM.replace(b"\n", b"\r\n")])
def test_rows_of_all_alignments_come_without_gaps_and_with_their_family(tmp_path: Path, stored: bytes) -> None:
    records = list(open_sequences(write(tmp_path, stored)))
    assert records == [
        Record("Q9Y7F0/158-193", "PF10417.12;1-cysPrx_C;", b"AFQfTEKY", 6),
        Record("Q63716/162-197", "PF10417.12;1-cysPrx_C;", b"FQFDK", 8),
        Record("x/1-2", "", b"AC", 14),
    ]
    assert [record.family for record in records] == ["PF10417", "PF10417", ""]
    (block,) = open_sequences(write(tmp_path, stored)).blocks()
    assert block.families.tolist() == [10417, 10417, -1]


def test_groups_of_an_interleaved_alignment_are_joined(tmp_path: Path) -> None:
    assert read(write(tmp_path, INTERLEAVED)) == [("a", b"ACDE", 3), ("b", b"DF", 4)]


@given(
    rows=st.lists(st.text("ACD.-", min_size=1, max_size=12), min_size=1, max_size=6),
    group_width=st.integers(1, 12),
    block_bytes=st.integers(1, 40),
)
def test_any_alignment_gives_its_sequences_however_it_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], group_width: int, block_bytes: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    width = max(map(len, rows))
    aligned = ["A" + row.ljust(width, ".") for row in rows]
    text = "# STOCKHOLM 1.0\n"
    for start in range(0, width + 1, group_width):
        text += "".join(f"s{place}  {row[start : start + group_width]}\n" for place, row in enumerate(aligned)) + "\n"
    expected = [(f"s{place}", row.replace(".", "").replace("-", "").encode()) for place, row in enumerate(aligned)]
    assert [found[:2] for found in read(write(tmp_path, (text + "//\n").encode()))] == expected


def test_a_large_alignment_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockholm, "MAX_HELD_LETTERS", 10)
    rows = b"".join(b"s%d ACDE\n" % number for number in range(9))
    assert len(read(write(tmp_path, b"# STOCKHOLM 1.0\n" + rows + b"//\n"))) == 9
    path = write(tmp_path, b"# STOCKHOLM 1.0\n" + rows + b"\n" + rows + b"//\n")
    with pytest.raises(InputError, match=r"file\.sto:12: the alignment is interleaved and has more than .* one line a"):
        read(path)


BAD_RECORDS = [
    (PFAM.replace(b"-FQF.-.DK.", b"-FQF.-.DK"), ":8: row 'Q63716/162-197' has 9 columns, those before it 10", 2),
    (PFAM.replace(b"A.C", b".-."), ":14: record 'x/1-2' has no sequence", 2),
    (PFAM.replace(b"A.C", b"A\0C"), ":14: the record holds binary data", 2),
    (PFAM.replace(b"A.C", b"A C"), ":14: the line is not 'name residues'", 2),
    (INTERLEAVED.replace(b"a  DE", b"c  DE"), ":7: row 'c' goes on with no row", 2),
    (INTERLEAVED.replace(b"b  -F", b"b  F"), ":8: row 'b' has 1 columns, those before it 2", 1),
    (INTERLEAVED.replace(b"b  .D.", b"b  D"), ":4: row 'b' has 1 columns, those before it 3", 1),
]


@pytest.mark.parametrize(("content", "said", "num_good"), BAD_RECORDS)
def test_a_bad_row_is_fatal_or_skipped_as_asked(tmp_path: Path, content: bytes, said: str, num_good: int) -> None:
    path = write(tmp_path, content)
    messages: list[str] = []
    assert len(list(open_sequences(path, on_bad_record=messages.append))) == num_good
    assert [message.startswith(f"{path}{said}") for message in messages] == [True]
    with pytest.raises(InputError, match="correct it, or skip such records"):
        read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (PFAM[:-4], ":14: the alignment has no end, '//'"),
        (PFAM[:-3], ":15: the alignment has no end, '//'"),
        (b"a ACD\n//\n", ":1: no '# STOCKHOLM 1.0' stands before the rows"),
        (b"# STOCKHOLM 1.0\n//\n", ": is empty"),
        (b"", ": is empty"),
        (INTERLEAVED.replace(b"b  .D.", b"a  .D."), ":7: the alignment is interleaved and has a name twice"),
    ],
)
def test_what_is_no_whole_stockholm_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        list(open_sequences(path, "stockholm"))
    assert str(caught.value).startswith(f"{path}{said}")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 100)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path, b"# STOCKHOLM 1.0\na " + b"A" * 5000)
    with pytest.raises(InputError, match=r"file\.sto:2: the line has no end in"):
        read(path)
