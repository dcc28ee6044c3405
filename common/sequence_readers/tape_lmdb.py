"""TAPE's LMDBs (Rao et al. 2019): decimal numbers from 0 as keys, pickled dicts as values, ``num_examples``.

Pickles run code when they are loaded as they come; here a restricted unpickler builds plain values and arrays only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaprot.common.errors import InputError
from megaprot.common.safe_pickle import BadPickle, loads_restricted
from megaprot.common.sequence_readers.json_files import BadRow, tape_row
from megaprot.common.sequence_readers.reader import Row, RowReader

MAGIC = b"\xde\xc0\xef\xbe"
MAGIC_PLACE = slice(16, 20)  # in the first page, behind its header
DATA_FILE = "data.mdb"  # in an LMDB that is a folder
_COUNT_KEY = b"num_examples"
_ROWS_BETWEEN_CHECKSUMS = 4096


class TapeLmdbReader(RowReader):
    """The records of an LMDB, a file or a folder with ``data.mdb``; needs the package lmdb.

    A record's "line" is its key, a number from 0. See ``tape_row`` for what is read of it.
    """

    def where(self, line: int) -> str:
        """Return ``file, record 3``, as messages begin."""
        return f"{self.name}, record {line}"

    def _rows(self) -> Iterator[Row]:
        for number, record in self.records():
            try:
                yield tape_row(number, record)
            except BadRow as error:
                self.report(number, str(error))

    def records(self) -> Iterator[tuple[int, Any]]:
        """Yield (number, decoded record) of each entry, labels and all; report what is missing or no plain pickle."""
        library = self._library()
        path = Path(self.path)
        stored = path / DATA_FILE if path.is_dir() else path
        self._check_file(stored)
        try:
            with (
                library.open(self.path, subdir=path.is_dir(), readonly=True, lock=False, create=False) as environment,
                self.source.passed_over(stored) as pass_over,
                environment.begin(buffers=True) as transaction,
            ):
                self._check_size(environment, stored.stat().st_size)
                num_records = self._num_records(transaction, environment.stat()["entries"])
                for number in range(num_records):
                    value = transaction.get(b"%d" % number)
                    try:
                        record = loads_restricted(value) if value is not None else None
                    except BadPickle as error:
                        self.report(number, f"the record {error}")
                    else:
                        if value is None:
                            self.report(number, "the record is missing")
                        else:
                            yield number, record
                    if number % _ROWS_BETWEEN_CHECKSUMS == 0:
                        pass_over(number / num_records)
        except library.Error as error:
            raise InputError(f"{self.name}: is damaged or no LMDB ({error}): copy it again.") from None

    def _library(self) -> Any:
        if self.path == "-":
            raise InputError("an LMDB cannot be read from standard input: give the file or folder.")
        try:
            import lmdb
        except ImportError:
            raise InputError(f"{self.name}: LMDB needs the package lmdb: pip install 'megaprot[data]'.") from None
        return lmdb

    def _check_file(self, stored: Path) -> None:
        """Raise InputError unless the file can be read and has the mark of an LMDB, which the library asks for late."""
        try:
            with stored.open("rb") as stream:
                head = stream.read(MAGIC_PLACE.stop)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read ({error.strerror}): give an LMDB of TAPE.") from None
        if not head:
            raise InputError(f"{self.name}: is empty: give an LMDB of TAPE.")
        if head[MAGIC_PLACE] != MAGIC:
            raise InputError(f"{self.name}: is no LMDB: give an LMDB of TAPE, or its format with --format.")

    def _check_size(self, environment: Any, file_size: int) -> None:
        """Raise InputError for a file shorter than its pages, since reading one that is not there kills the process."""
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if file_size < needed:
            raise InputError(
                f"{self.name}: has {file_size:,} bytes of {needed:,}: the file is truncated, copy it again."
            )

    def _num_records(self, transaction: Any, num_entries: int) -> int:
        try:
            num_records = loads_restricted(transaction.get(_COUNT_KEY, b""))
        except BadPickle:
            num_records = None
        if not isinstance(num_records, int) or not 0 <= num_records < num_entries:
            raise InputError(
                f"{self.name}: holds {num_entries:,} entries and no '{_COUNT_KEY.decode()}' that counts them: "
                "give an LMDB of TAPE, copied as a whole."
            )
        return num_records
