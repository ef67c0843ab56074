"""Documents of local files: `.txt`, `.jsonl` and `.parquet`, plain or gzipped."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason


def data_suffix(path: Path) -> str:
    """The suffix that tells a file's format, `.gz` apart."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return suffixes[-1] if suffixes else ""


def read_file(path: Path, column: str | None) -> Iterator[str]:
    """Yield the documents of a `.txt` (blocks between blank lines), `.jsonl` or `.parquet` file.

    Raises UserError if it cannot be read, or a row has no clear text.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    utf8 = "utf-8-sig"  # with or without a byte order mark
    suffix = data_suffix(path)
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            with opener(path, "rb") as file:
                table = pyarrow.parquet.ParquetFile(file)
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        yield text_of(row, column, str(path))
        elif suffix == ".jsonl":
            with opener(path, "rt", encoding=utf8) as file:
                for line in file:
                    if line.strip():
                        yield text_of(json.loads(line), column, str(path))
        else:
            with opener(path, "rt", encoding=utf8) as file:
                yield from _blocks(file)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # UTF-8, JSON, parquet, gzip
        raise UserError(
            f"Cannot read '{path}' as {suffix} text ({reason(error)}): expected "
            "UTF-8 text, one JSON object a line, or a parquet table."
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


def text_of(row: Any, column: str | None, origin: str) -> str:
    """The text of a row: the named column, `text`, `content`, or the only string there is."""
    if isinstance(row, str):
        return _valid(row)
    strings = [k for k, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
    candidates = [column] if column else ["text", "content"]
    for name in candidates:
        if name in strings:
            return _valid(row[name])
    if isinstance(row, dict) and any(row.get(name, row) is None for name in candidates):
        return ""  # a row without text, and no other column stands in for it
    if column is None and len(strings) == 1:
        return _valid(row[strings[0]])
    raise UserError(
        f"Expected a text column {' or '.join(repr(c) for c in candidates)} in '{origin}', found "
        f"columns {sorted(row) if isinstance(row, dict) else type(row).__name__}: rename one."
    )


def _valid(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode(errors="replace").decode()
