"""Where documents come from: named sets, local files, hub datasets."""

import functools
import importlib
import importlib.resources
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sp3llm.errors import UserError, reason
from sp3llm.text.files import data_suffix, is_file, read_file, split_column
from sp3llm.text.rows import Render, plain_render, text_of
from sp3llm.text.split import content_hash, part_of
from sp3llm.text.stdlib import stdlib_documents

# A streamed hub set is shuffled in a buffer of this many documents, as it cannot be as a whole.
_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class TextSource:
    """Where documents come from and how they are joined."""

    name: str
    """What the user called it: a name of the manifest, a path, or a hub dataset."""
    licence: str
    """Licence of the text, or `unknown`."""
    join: str
    """`eos`: an end-of-sequence token between documents; any other value: that text itself."""
    stdlib: bool = False
    """Whether it is the running Python's own documentation (`text.stdlib`)."""
    path: str | None = None
    """Of a local file; None: it is none."""
    dataset: str | None = None
    """Of a hub dataset, which `datasets` loads: `owner/name`; None: it is none."""
    config: str | None = None
    """The dataset's configuration; None: the only or the default one."""
    revision: str | None = None
    """The dataset's commit, so that the same command reads the same text next year."""
    split: str = "train"
    """The split that calibration and training read."""
    evaluation_split: str | None = None
    """The split that evaluation reads; None: the set has none, and `split` is divided."""
    column: str | None = None
    """The column that holds the text; None: found by looking."""
    document_start: str | None = None
    """For sets that hold a line in each row: what a row that opens a document begins and ends with.
    None: every row is a document."""
    streaming: bool = True
    """Whether only as much of the dataset is downloaded as is needed."""


@functools.cache
def manifest() -> dict[str, TextSource]:
    """The named sets of `calib_data/manifest.json`."""
    installed = importlib.resources.files("sp3llm") / "calib_data" / "manifest.json"
    in_repository = Path(__file__).parents[2] / "calib_data" / "manifest.json"
    file = installed if installed.is_file() else in_repository
    entries = json.loads(file.read_text(encoding="utf-8"))
    return {name: TextSource(name=name, **fields) for name, fields in entries.items()}


def resolve_source(name: str) -> TextSource:
    """A named set, a local `.txt`, `.jsonl` or `.parquet` (plain or gzip), or a hub dataset
    (`owner/name` or `owner/name:config`).

    Raises UserError if it is none of them.
    """
    if name in manifest():
        return manifest()[name]
    file, column = split_column(name)
    path = Path(file)
    suffix = data_suffix(path)
    if suffix in (".txt", ".jsonl", ".parquet"):
        if not is_file(file):
            raise UserError(
                f"Calibration or evaluation text '{file}' does not exist, or is no file: name a "
                "file that does."
            )
        join = "" if suffix == ".txt" else "eos"  # blocks of a text hold what stands between them
        return TextSource(name=name, licence="unknown", join=join, path=file, column=column)
    if is_file(name):
        raise UserError(
            f"Expected a .txt, .jsonl or .parquet file (plain or .gz) of text, found '{name}': "
            "convert it to one of them."
        )
    if "/" in name and not name.startswith((".", "/")):
        return hub_source(name)
    raise UserError(
        f"Unknown text set '{name}': expected one of {', '.join(sorted(manifest()))}, a .txt, "
        ".jsonl or .parquet file, or a hub dataset as owner/name."
    )


def hub_source(name: str) -> TextSource:
    """A dataset of the hub, named `owner/name` or `owner/name:config`."""
    dataset, _, config = name.partition(":")
    return TextSource(
        name=name, licence="unknown", join="eos", dataset=dataset, config=config or None
    )


def read_documents(
    source: TextSource, part: str, seed: int = 0, render: Render = plain_render
) -> Iterator[str]:
    """Yield the source's documents for `part` (`train`, `calibration` or `evaluation`), none twice.

    A hub dataset gives `split` to training and calibration, and `evaluation_split` to evaluation;
    one without the latter is divided in two by `part_of`, and `stdlib` in three. A local file is
    read whole for every part: what it is for is its owner's choice, and overlap is dropped by
    content.
    """
    if source.stdlib:
        documents: Iterable[str] = (d for d in stdlib_documents() if part_of(d) == part)
    elif source.path:
        documents = read_file(Path(source.path), source.column, render)
    elif part == "evaluation" and source.evaluation_split is None:
        documents = (d for d in read_hub(source, source.split, seed, render) if part_of(d) == part)
    elif part == "evaluation":
        documents = read_hub(source, source.evaluation_split or "", seed, render)
    elif source.evaluation_split is None:
        documents = (
            d for d in read_hub(source, source.split, seed, render) if part_of(d) != "evaluation"
        )
    else:
        documents = read_hub(source, source.split, seed, render)
    seen: set[str] = set()
    for document in documents:
        key = content_hash(document)
        if document.strip() and key not in seen:
            seen.add(key)
            yield document


def read_hub(
    source: TextSource, split: str, seed: int, render: Render = plain_render
) -> Iterator[str]:
    """Yield the documents of a hub dataset's split; of one that is streamed in an order drawn from
    `seed`.

    Raises UserError if `datasets` is not installed or cannot load it.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"The set '{source.name}' needs the package datasets, which is not installed: "
            "pip install datasets, or use --calib stdlib, which needs no download."
        ) from error
    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.config,
            split=split,
            revision=source.revision,
            streaming=source.streaming,
        )
        if source.streaming:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        origin = f"'{source.name}'"
        texts = (text_of(row, source.column, origin, render) for row in rows)
        yield from _articles(texts, source.document_start) if source.document_start else texts
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds, most of them about the network
        raise UserError(
            f"Cannot load the hub dataset '{source.dataset}' ({type(error).__name__}: "
            f"{reason(error)}): check the name (owner/name or owner/name:config) and the network, "
            "or use --calib stdlib or a local file."
        ) from error


def _articles(rows: Iterable[str], start: str) -> Iterator[str]:
    """Join rows of one line into documents, as WikiText has them.

    With `start` being `=`, a row ` = Title = ` opens a document and ` = = Section = = ` does not.
    """
    article: list[str] = []
    for row in rows:
        heading = row.strip()
        opens = heading.startswith(start) and not heading.startswith(f"{start} {start}")
        if opens and heading.endswith(start) and len(heading) > 2 * len(start) and article:
            yield "".join(article)
            article = []
        article.append(row)
    if article:
        yield "".join(article)


def local_files(names: str) -> dict[str, Path]:
    """The local files among the sets of a comma-separated list, by how the list names them.

    Raises UserError as `resolve_source` does.
    """
    sources = {name: resolve_source(name) for name in split_names(names)}
    return {name: Path(source.path) for name, source in sources.items() if source.path}


def default_evaluation(calib: str) -> str:
    """The set to evaluate on where none is named: the first of the calibration sets that stands in
    the manifest and has an evaluation part of its own, else `stdlib`.
    """
    for name in split_names(calib):
        source = manifest().get(name)
        if source and (source.stdlib or source.evaluation_split):
            return name
    return "stdlib"


def split_names(names: str) -> list[str]:
    """The names of a comma-separated list.

    Raises UserError if there is none, or one twice.
    """
    stripped = [name.strip() for name in names.split(",") if name.strip()]
    if not stripped:
        raise UserError(
            f"Expected the name of a text set, found '{names}': name one of "
            f"{', '.join(sorted(manifest()))}, a file, or a hub dataset."
        )
    if len(set(stripped)) < len(stripped):
        raise UserError(f"Expected each text set once, found '{names}': name it once.")
    return stripped
