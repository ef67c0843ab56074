"""Documents of local files: `.txt`, `.jsonl` and `.parquet`, plain or gzipped."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sp3llm.errors import UserError, reason
from sp3llm.text.rows import Render, plain_render, text_of


def data_suffix(path: Path) -> str:
    """The suffix that tells a file's format, `.gz` apart."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return suffixes[-1] if suffixes else ""


def split_column(name: str) -> tuple[str, str | None]:
    """A file's path and the column asked for of it: `chats.jsonl:messages` names both."""
    path, colon, column = name.rpartition(":")
    if colon and not Path(name).is_file() and data_suffix(Path(path)) in (".jsonl", ".parquet"):
        return path, column
    return name, None


def read_file(path: Path, column: str | None, render: Render = plain_render) -> Iterator[str]:
    """Yield the documents of a `.txt` (blocks between blank lines), `.jsonl` or `.parquet` file;
    `render` makes texts of conversations.

    Raises UserError, naming the line or row, if it cannot be read, or a row has no clear text.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    utf8 = "utf-8-sig"  # with or without a byte order mark
    suffix = data_suffix(path)
    try:
        if suffix == ".parquet":
            with opener(path, "rb") as file:
                for number, row in enumerate(_parquet_rows(file), 1):
                    yield text_of(row, column, f"row {number} of '{path}'", render)
        elif suffix == ".jsonl":
            with opener(path, "rt", encoding=utf8) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        origin = f"line {number} of '{path}'"
                        yield text_of(_parsed(line, origin), column, origin, render)
        else:
            with opener(path, "rt", encoding=utf8) as file:
                yield from _blocks(file)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # UTF-8, parquet, gzip
        raise UserError(
            f"Cannot read '{path}' as {suffix} text ({reason(error)}): expected "
            "UTF-8 text, one JSON object a line, or a parquet table."
        ) from error


def _parquet_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _parsed(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"Expected JSON in {origin}, found something else ({reason(error)}): mend the line, or "
            "leave it out."
        ) from error


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Blocks of a text file, as separated by blank lines: the unit in which overlap is found."""
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\n")
            block = []
    if block:
        yield "".join(block).rstrip("\n")
