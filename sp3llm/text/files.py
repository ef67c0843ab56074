"""Documents of local files: `.txt`, `.jsonl` and `.parquet`, plain or gzipped."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sp3llm.errors import UserError, reason
from sp3llm.text.rows import Render, plain_render, text_of


def data_suffix(path: Path) -> str:
    """The suffix that tells a file's format, in lower case, `.gz` apart."""
    suffixes = path.suffixes[:-1] if _is_zipped(path) else path.suffixes
    return suffixes[-1].lower() if suffixes else ""


def _is_zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def split_column(name: str) -> tuple[str, str | None]:
    """A file's path and the column asked for of it: `chats.jsonl:messages` names both."""
    path, colon, column = name.rpartition(":")
    if colon and not is_file(name) and data_suffix(Path(path)) in (".jsonl", ".parquet"):
        return path, column
    return name, None


def is_file(name: str) -> bool:
    """Whether a name is that of a file; one that no file can have is of none."""
    return os.path.isfile(name)  # Path.is_file raises where a name is too long


def read_file(path: Path, column: str | None, render: Render = plain_render) -> Iterator[str]:
    """Yield the documents of a `.txt` (blocks up to blank lines), `.jsonl` or `.parquet` file;
    `render` makes texts of conversations.

    Raises UserError, naming the line or row, if it cannot be read, or a row has no clear text.
    """
    opener = gzip.open if _is_zipped(path) else open
    suffix = data_suffix(path)
    try:
        if suffix == ".parquet":
            with opener(path, "rb") as file:
                for number, row in enumerate(_parquet_rows(file), 1):
                    yield text_of(row, column, f"row {number} of '{path}'", render)
        elif suffix == ".jsonl":
            with opener(path, "rb") as file:
                for number, line in enumerate(_lines(file, path), 1):
                    if line.strip():
                        origin = f"line {number} of '{path}'"
                        yield text_of(_parsed(line, origin), column, origin, render)
        else:
            with opener(path, "rb") as file:
                yield from _blocks(_lines(file, path))
    except (ValueError, OSError, EOFError, zlib.error) as error:  # UTF-8, parquet, gzip
        raise UserError(
            f"Cannot read '{path}' as {suffix} text ({reason(error)}): expected "
            "UTF-8 text, one JSON object a line, or a parquet table."
        ) from error


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    """The lines of a file of UTF-8, which may begin with a byte order mark.

    Raises UserError, naming the line, where it is something else.
    """
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"Expected UTF-8 text in line {number} of '{path}', found something else "
                f"({reason(error)}): convert the file, or leave the line out."
            ) from error
        yield text.replace("\r\n", "\n")


def _parquet_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    # Times are no text, and not all of them are Python's too.
    columns = [
        field.name for field in table.schema_arrow if not pyarrow.types.is_temporal(field.type)
    ]
    for batch in table.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _parsed(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter of lists thousands deep
        raise UserError(
            f"Expected JSON in {origin}, an object a line, found something else "
            f"({reason(error)}): mend the line, or leave it out."
        ) from error


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Blocks of a text file, the unit in which overlap is found: lines up to blank ones, and these
    with them, so that blocks in a row are the file as it stands. The last one gets a blank line
    where it has none, since it may come to stand before another.
    """
    block: list[str] = []
    has_text = ends = False
    for line in lines:
        is_blank = not line.strip()
        if ends and not is_blank:
            yield "".join(block)
            block, has_text = [], False
        block.append(line)
        has_text = has_text or not is_blank
        ends = has_text and is_blank
    if has_text:
        yield "".join(block) if ends else "".join(block).removesuffix("\n") + "\n\n"
