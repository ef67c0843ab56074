"""Text for calibration and evaluation: documents in, fixed-length token windows out.

Three rules hold everywhere, training script included:

* **One split.** `part_of` sends a document to `train`, `calibration` or `evaluation` by a hash
  of its own content, so no list of files has to be kept and no run can leak into another.
* **Packed, never padded.** Documents are tokenized, joined and cut into windows of exactly
  `seq_len` tokens; each window begins with the tokenizer's BOS where the tokenizer adds one.
* **Same seed, same windows.** The order of documents depends on the seed and their content only.
"""

import ast
import functools
import gzip
import hashlib
import importlib
import importlib.resources
import json
import random
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason

if TYPE_CHECKING:
    import torch

PARTS = ("train", "calibration", "evaluation")
_TRAIN_PERCENT, _CALIBRATION_PERCENT = 60, 25  # the remaining 15 are for evaluation
# One training document in this many is not trained on, but decides when to stop.
_STOPPING_SHARE = 16

# A streamed hub set is shuffled in a buffer of this many documents.
_SHUFFLE_BUFFER = 10_000
# Documents joined by text are tokenized in runs of about this many characters.
_RUN_CHARS = 1 << 16


def content_hash(text: str) -> str:
    """SHA-256 of a document with its white space normalised, as 64 hex digits."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def part_of(text: str) -> str:
    """The part a document belongs to, by its content alone: 60 % train, 25 % calibration, 15 %
    evaluation.
    """
    percent = int(content_hash(text)[:8], 16) % 100
    if percent < _TRAIN_PERCENT:
        return "train"
    return "calibration" if percent < _TRAIN_PERCENT + _CALIBRATION_PERCENT else "evaluation"


def is_for_stopping(text: str) -> bool:
    """Whether a training document is kept apart to decide when to stop: a sixteenth are, by other
    digits of the hash than `part_of` reads.

    Such text is neither trained on nor what results are reported on.
    """
    return int(content_hash(text)[8:16], 16) % _STOPPING_SHARE == 0


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
    """The running Python's own documentation."""
    path: str | None = None
    """A local file."""
    dataset: str | None = None
    """A hub dataset, loaded with `datasets`."""
    config: str | None = None
    """Its configuration."""
    revision: str | None = None
    """Its commit, so that the same command reads the same text next year."""
    split: str = "train"
    """The split calibration reads."""
    evaluation_split: str | None = None
    """The split evaluation reads; None: the set has none."""
    column: str | None = None
    """The column that holds the text; None: found by looking."""
    document_start: str | None = None
    """For sets of one line a row: a row that starts with this and ends alike opens a document."""
    streaming: bool = True
    """Read only as much of the set as is needed."""


@dataclass(frozen=True)
class Windows:
    """Token windows with what a reader needs to trust them."""

    tokens: "torch.Tensor"
    """Token ids, `(samples, seq_len)`, int64."""
    sources: tuple[str, ...]
    """The sets drawn from."""
    documents: frozenset[str]
    """Content hashes of every document drawn."""
    begins_with_bos: bool
    """Each window begins with the tokenizer's BOS."""
    dropped_documents: int = 0
    """Documents left out since they also occur in an excluded set."""

    @property
    def sha256(self) -> str:
        """Hash of the token ids, shape included."""
        header = repr(tuple(self.tokens.shape)).encode()
        return hashlib.sha256(header + self.tokens.numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What `sp3llm.json` records of these windows."""
        return {
            "sources": list(self.sources),
            "samples": self.tokens.shape[0],
            "seq_len": self.tokens.shape[1],
            "begins_with_bos": self.begins_with_bos,
            "documents": len(self.documents),
            "dropped_documents": self.dropped_documents,
            "sha256": self.sha256,
        }


# --------------------------------------------------------------------------- sources


@functools.cache
def manifest() -> dict[str, TextSource]:
    """The named sets of `calib_data/manifest.json`."""
    installed = importlib.resources.files("sp3llm") / "calib_data" / "manifest.json"
    in_repository = Path(__file__).parent.parent / "calib_data" / "manifest.json"
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
    path = Path(name)
    suffix = _data_suffix(path)
    if suffix in (".txt", ".jsonl", ".parquet"):
        if not path.is_file():
            raise UserError(
                f"Calibration or evaluation text '{name}' does not exist: name a file that does."
            )
        join = "\n\n" if suffix == ".txt" else "eos"
        return TextSource(name=name, licence="unknown", join=join, path=name)
    if path.is_file():
        raise UserError(
            f"Expected a .txt, .jsonl or .parquet file (plain or .gz) of text, found '{name}': "
            "convert it to one of them."
        )
    if "/" in name and not name.startswith((".", "/")):
        dataset, _, config = name.partition(":")
        return TextSource(
            name=name, licence="unknown", join="eos", dataset=dataset, config=config or None
        )
    raise UserError(
        f"Unknown text set '{name}': expected one of {', '.join(sorted(manifest()))}, a .txt, "
        ".jsonl or .parquet file, or a hub dataset as owner/name."
    )


def read_documents(source: TextSource, part: str, seed: int = 0) -> Iterator[str]:
    """Yield the source's documents for `part`, deduplicated by content.

    `calibration` reads the source's calibration split, `train` too, and `evaluation` its
    evaluation split. A hub set without an evaluation split (into two), and `stdlib` (into all
    three), are divided by `part_of`. A local file is
    read whole: what it is for is its owner's choice, and overlap is dropped by content.
    """
    if source.stdlib:
        documents: Iterable[str] = (d for d in stdlib_documents() if part_of(d) == part)
    elif source.path:
        documents = _read_file(Path(source.path), source.column)
    elif part == "evaluation" and source.evaluation_split is None:
        documents = (d for d in _read_hub(source, source.split, seed) if part_of(d) == part)
    elif part == "evaluation":
        documents = _read_hub(source, source.evaluation_split or "", seed)
    elif source.evaluation_split is None:
        documents = (d for d in _read_hub(source, source.split, seed) if part_of(d) != "evaluation")
    else:
        documents = _read_hub(source, source.split, seed)
    seen: set[str] = set()
    for document in documents:
        key = content_hash(document)
        if document.strip() and key not in seen:
            seen.add(key)
            yield document


def _data_suffix(path: Path) -> str:
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path, column: str | None) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    utf8 = "utf-8-sig"  # with or without a byte order mark
    suffix = _data_suffix(path)
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            with opener(path, "rb") as file:
                table = pyarrow.parquet.ParquetFile(file)
                for batch in table.iter_batches():
                    for row in batch.to_pylist():
                        yield _text_of(row, column, str(path))
        elif suffix == ".jsonl":
            with opener(path, "rt", encoding=utf8) as file:
                for line in file:
                    if line.strip():
                        yield _text_of(json.loads(line), column, str(path))
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


def _text_of(row: Any, column: str | None, origin: str) -> str:
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


def _read_hub(source: TextSource, split: str, seed: int) -> Iterator[str]:
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
        texts = (_text_of(row, source.column, source.name) for row in rows)
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
    """Join rows into documents; ` = Title = ` opens one, ` = = Section = = ` does not."""
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


# --------------------------------------------------------------------------- stdlib


@functools.cache
def stdlib_documents() -> tuple[str, ...]:
    """The running Python's own documentation: pydoc topics and every docstring of the standard
    library, in a fixed order, without duplicates.

    Python sources are parsed, not imported; extension modules are imported for theirs.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            texts.extend(_docstrings_of_source(path))
    for name in sorted(sys.stdlib_module_names):
        if "test" not in name and not (root / f"{name}.py").exists() and not (root / name).is_dir():
            texts.extend(_docstrings_of_extension(name))
    unique: dict[str, str] = {}
    for text in texts:
        if len(text) >= 80:
            unique.setdefault(content_hash(text), text.strip())
    return tuple(unique.values())


def _docstrings_of_source(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 keeps files that are wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _docstrings_of_extension(name: str) -> Iterator[str]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not built on this machine
        return
    names = sorted(vars(module).keys() - {"_"})  # builtins._ is the last value of a session
    members = [module, *(vars(module)[name] for name in names)]
    for member in members:
        if not _is_stdlib(member):  # such as sys.stdout and sys.excepthook in a notebook
            continue
        owned = [vars(member)[key] for key in sorted(vars(member))] if _is_class(member) else []
        for item in (member, *owned):
            text = getattr(item, "__doc__", None)
            if isinstance(text, str):
                yield text


def _is_stdlib(value: object) -> bool:
    origin = getattr(value, "__module__", None)
    origin = origin if isinstance(origin, str) else type(value).__module__
    return origin.partition(".")[0] in sys.stdlib_module_names


def _is_class(value: object) -> bool:
    return isinstance(value, type) and value.__module__ != "collections.abc"


# --------------------------------------------------------------------------- windows


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder.

    Raises UserError if there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"Expected a tokenizer in '{folder}', found none that loads "
            f"({type(error).__name__}: {reason(error)}): put the model's tokenizer files there."
        ) from error


def default_evaluation(calib: str) -> str:
    """The held-out text that goes with calibration sets: that of the first named set that has an
    evaluation part of its own, or the standard library's.
    """
    for name in _split_names(calib):
        source = manifest().get(name)
        if source and (source.stdlib or source.evaluation_split):
            return name
    return "stdlib"


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def pack(documents: Iterable[str], tokenizer: Any, join: str) -> Iterator[list[int]]:
    """Yield runs of token ids whose concatenation is the packed text.

    With `join="eos"` every document is followed by the tokenizer's EOS (a blank line where there
    is none); otherwise documents are joined by that text before they are tokenized.
    """
    if join == "eos" and tokenizer.eos_token_id is not None:
        for document in documents:
            yield [*_encode(tokenizer, document), tokenizer.eos_token_id]
        return
    separator = "\n\n" if join == "eos" else join
    run: list[str] = []
    for document in documents:
        run.append(document)
        if sum(map(len, run)) >= _RUN_CHARS:
            yield _encode(tokenizer, separator.join(run) + separator)
            run = []
    if run:
        yield _encode(tokenizer, separator.join(run) + separator)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def cut_windows(
    runs: Iterable[list[int]], seq_len: int, bos_token_id: int | None
) -> Iterator[list[int]]:
    """Cut packed runs into consecutive windows of exactly `seq_len` ids, BOS first if given.

    The tail that does not fill a window is dropped.
    """
    head = [] if bos_token_id is None else [bos_token_id]
    body = seq_len - len(head)
    pending: list[int] = []
    for run in runs:
        pending.extend(run)
        while len(pending) >= body:
            yield head + pending[:body]
            pending = pending[body:]


def calibration_windows(
    names: str, tokenizer: Any, samples: int, seq_len: int, seed: int
) -> Windows:
    """Exactly `samples` windows of `seq_len` tokens from the comma-separated sets `names`.

    Several sets give equal shares (the first ones one window more where it does not divide).
    Documents are taken in an order drawn from `seed`.

    Raises UserError if a set is unknown, unreadable, empty or too small.
    """
    sources = [resolve_source(name) for name in _split_names(names)]
    rows: list[list[int]] = []
    hashes: set[str] = set()
    for index, source in enumerate(sources):
        share = samples // len(sources) + (index < samples % len(sources))
        documents: Iterable[str] = read_documents(source, "calibration", seed)
        if not (source.dataset and source.streaming):
            documents = sorted(documents, key=content_hash)
            random.Random(seed).shuffle(documents)
        found = _take(documents, source, tokenizer, share, seq_len, hashes)
        if len(found) < share:
            raise UserError(
                f"Calibration set '{source.name}' holds {len(found)} windows of {seq_len} tokens, "
                f"{share} were asked for: lower --samples or --seq-len, or add a set to --calib."
            )
        rows.extend(found)
    return _windows(rows, sources, hashes, tokenizer, dropped=0)


def evaluation_windows(
    names: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    exclude: frozenset[str] = frozenset(),
) -> Windows:
    """At most `samples` windows of held-out text, in a fixed order that no seed changes.

    Documents whose content hash is in `exclude` (the calibration documents) are dropped and
    counted.

    Raises UserError if not even one window is left.
    """
    sources = [resolve_source(name) for name in _split_names(names)]
    rows: list[list[int]] = []
    hashes: set[str] = set()
    dropped: list[str] = []
    for index, source in enumerate(sources):
        share = samples // len(sources) + (index < samples % len(sources))

        documents = _without(read_documents(source, "evaluation"), exclude, dropped)
        rows.extend(_take(documents, source, tokenizer, share, seq_len, hashes))
    if not rows:
        raise UserError(
            f"Evaluation text '{names}' does not fill one window of {seq_len} tokens after "
            f"{len(dropped)} documents that also occur in the calibration set were dropped: choose "
            "other text with --eval-text."
        )
    return _windows(rows, sources, hashes, tokenizer, len(dropped))


def unbroken_windows(name: str, tokenizer: Any, seq_len: int) -> Windows:
    """All windows of a set's evaluation split, cut as papers on pruning cut them.

    GPTQ, SparseGPT and SliceGPT join the rows of the split by blank lines, empty rows too,
    tokenize that text at once (a BOS, where the tokenizer adds one, comes at its very beginning
    only) and cut it into windows that do not overlap. `evaluation_windows` differs: it drops
    duplicates, knows where documents end, and begins every window with the BOS.

    Raises UserError if the set is unknown, unreadable or shorter than one window.
    """
    source = resolve_source(name)
    if source.dataset and source.evaluation_split:
        rows = list(_read_hub(replace(source, document_start=None), source.evaluation_split, 0))
    else:
        rows = list(read_documents(source, "evaluation"))
    ids = tokenizer("\n\n".join(rows), verbose=False)["input_ids"]
    windows = list(cut_windows([ids], seq_len, None))
    if not windows:
        raise UserError(
            f"Evaluation text '{name}' holds {len(ids)} tokens, fewer than one window of "
            f"{seq_len}: choose other text or shorter windows."
        )
    import torch

    return Windows(
        tokens=torch.tensor(windows, dtype=torch.int64),
        sources=(source.name,),
        documents=frozenset(map(content_hash, rows)),
        begins_with_bos=False,
    )


def training_windows(
    names: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    exclude: frozenset[str],
    stopping: bool = False,
) -> Windows:
    """At most `samples` windows to train on from the comma-separated sets `names`, or, with
    `stopping`, of what is kept apart from that to decide when to stop.

    Sets give equal shares, or all they have. Documents whose content hash is in `exclude` (those
    of the evaluation) are dropped and counted; the others come in an order drawn from `seed`.

    Raises UserError if a set is unknown or unreadable, or not one window is left.
    """
    sources = [resolve_source(name) for name in _split_names(names)]
    rows: list[list[int]] = []
    hashes: set[str] = set()
    dropped: list[str] = []
    for index, source in enumerate(sources):
        share = samples // len(sources) + (index < samples % len(sources))
        apart = (d for d in read_documents(source, "train", seed) if is_for_stopping(d) == stopping)
        documents: Iterable[str] = _without(apart, exclude, dropped)
        if not (source.dataset and source.streaming):
            documents = sorted(documents, key=content_hash)
            random.Random(seed).shuffle(documents)
        rows.extend(_take(documents, source, tokenizer, share, seq_len, hashes))
    if not rows:
        what = "a sixteenth of the training text, kept to decide when to stop," if stopping else ""
        kept = "" if stopping else " and a sixteenth kept apart to decide when to stop recovery"
        advice = (
            "name text for it with --stop-text" if stopping else "choose text of more documents"
        )
        raise UserError(
            f"Expected at least one window of {seq_len} tokens in {what or 'the training text'} "
            f"'{names}' after {len(dropped)} documents of the evaluation were dropped"
            f"{kept}, found none: {advice}, or lower --seq-len."
        )
    return _windows(rows, sources, hashes, tokenizer, len(dropped))


def _without(
    documents: Iterable[str], exclude: frozenset[str], dropped: list[str]
) -> Iterator[str]:
    """The documents whose content hash is not in `exclude`; the others' hashes go to `dropped`."""
    for document in documents:
        digest = content_hash(document)
        if digest in exclude:
            dropped.append(digest)
        else:
            yield document


def _split_names(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise UserError(
            f"Expected the name of a text set, found '{names}': name one of "
            f"{', '.join(sorted(manifest()))}, a file, or a hub dataset."
        )
    if len(set(found)) < len(found):
        raise UserError(f"Expected each text set once, found '{names}': name it once.")
    return found


def _take(
    documents: Iterable[str],
    source: TextSource,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    hashes: set[str],
) -> list[list[int]]:
    def noted() -> Iterator[str]:
        for document in documents:
            hashes.add(content_hash(document))
            yield document

    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    runs = pack(noted(), tokenizer, source.join)
    return list(islice(cut_windows(runs, seq_len, bos), samples))


def _windows(
    rows: list[list[int]],
    sources: list[TextSource],
    hashes: set[str],
    tokenizer: Any,
    dropped: int,
) -> Windows:
    import torch

    return Windows(
        tokens=torch.tensor(rows, dtype=torch.int64),
        sources=tuple(source.name for source in sources),
        documents=frozenset(hashes),
        begins_with_bos=adds_bos(tokenizer),
        dropped_documents=dropped,
    )
