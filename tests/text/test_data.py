"""Documents in, windows out: one split, packed and never padded, same seed same windows."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sp3llm.errors import UserError
from sp3llm.text.sources import (
    TextSource,
    default_evaluation,
    manifest,
    read_documents,
    resolve_source,
)
from sp3llm.text.split import PARTS, content_hash, part_of
from sp3llm.text.stdlib import stdlib_documents
from sp3llm.text.tokenizer import adds_bos, encode
from sp3llm.text.windows import calibration_windows, cut_windows, evaluation_windows, pack
from tests.helpers import BOS, EOS, byte_tokenizer

HUB_SETS = [name for name, source in manifest().items() if not source.stdlib]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def sentences(count: int, word: str = "word") -> list[str]:
    return [f"{word} number {i} of {count}, and é" for i in range(count)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_documents(path: Path, documents: list[str]) -> str:
    return write_jsonl(path, [{"text": document} for document in documents])


def write_parquet(path: Path, **columns: list[Any]) -> str:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def documents_of(name: str, part: str = "calibration") -> list[str]:
    return list(read_documents(resolve_source(name), part))


def refusal(call: Any, *arguments: Any) -> str:
    """The sentence with which a call refuses."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --------------------------------------------------------------------------- one split


def test_part_depends_on_content_and_not_on_white_space():
    for document in stdlib_documents()[:200]:
        reflowed = "\r\n\t " + "   \n".join(document.split()) + "\n\n"
        assert content_hash(reflowed) == content_hash(document)
        assert part_of(reflowed) == part_of(document)
    assert content_hash("one two") != content_hash("one too")


def test_split_of_the_standard_library_has_the_documented_proportions():
    counts = Counter(map(part_of, stdlib_documents()))
    shares = {part: counts[part] / counts.total() for part in PARTS}
    assert shares == pytest.approx(
        {"train": 0.60, "calibration": 0.25, "evaluation": 0.15}, abs=0.02
    )


def test_parts_of_the_standard_library_are_disjoint_and_complete():
    parts = [set(map(content_hash, documents_of("stdlib", part))) for part in PARTS]
    assert not parts[0] & parts[1]
    assert not parts[1] & parts[2]
    assert not parts[0] & parts[2]
    assert set.union(*parts) == set(map(content_hash, stdlib_documents()))


def test_standard_library_has_no_document_twice():
    hashes = [content_hash(document) for document in stdlib_documents()]
    assert len(hashes) == len(set(hashes)) > 1000


def test_standard_library_is_the_same_in_a_process_with_hooks_of_its_own():
    """Notebooks and test runners replace `sys.stdout` and `sys.excepthook`."""
    script = """
import hashlib, io, sys
class Stream(io.StringIO):
    "A stream with a docstring long enough to count as a document, as that of a notebook has it."
def hook(*_):
    "A hook with a docstring long enough to count as a document, as that of a debugger has it."
stdout, sys.stdout, sys.excepthook = sys.stdout, Stream(), hook
from sp3llm.text.stdlib import stdlib_documents
print(hashlib.sha256(repr(stdlib_documents()).encode()).hexdigest(), file=stdout)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = hashlib.sha256(repr(stdlib_documents()).encode()).hexdigest()
    assert done.stdout.strip() == here


# --------------------------------------------------------------------------- windows


def test_same_seed_same_windows_other_seed_others(tokenizer, tmp_path):
    path = write_documents(tmp_path / "text.jsonl", sentences(60))
    for name in ("stdlib", path):
        first = calibration_windows(name, tokenizer, 8, 64, seed=0)
        assert calibration_windows(name, tokenizer, 8, 64, seed=0).sha256 == first.sha256
        assert calibration_windows(name, tokenizer, 8, 64, seed=1).sha256 != first.sha256


def test_order_of_the_file_does_not_change_the_windows(tokenizer, tmp_path):
    documents = sentences(40)
    one = write_documents(tmp_path / "one.jsonl", documents)
    other = write_documents(tmp_path / "other.jsonl", documents[::-1])
    windows = [calibration_windows(name, tokenizer, 8, 32, seed=3) for name in (one, other)]
    assert windows[0].sha256 == windows[1].sha256


@pytest.mark.parametrize("bos", [True, False])
def test_evaluation_windows_are_the_packed_text_without_a_gap(bos, tmp_path):
    tokenizer = byte_tokenizer(bos)
    documents = sentences(30)
    path = write_documents(tmp_path / "text.jsonl", documents)
    windows = evaluation_windows(path, tokenizer, 10**6, 32)
    packed = []
    for document in documents:
        packed += [*tokenizer(document, add_special_tokens=False)["input_ids"], EOS]
    body = windows.tokens[:, 1:] if bos else windows.tokens
    found = body.flatten().tolist()
    assert found == packed[: len(found)]
    assert len(packed) - len(found) < 32  # only what does not fill a window is dropped


@pytest.mark.parametrize("bos", [True, False])
def test_windows_begin_with_bos_exactly_where_the_tokenizer_adds_one(bos, tmp_path):
    tokenizer = byte_tokenizer(bos)
    assert tokenizer.bos_token_id == BOS
    assert adds_bos(tokenizer) is bos
    path = write_documents(tmp_path / "text.jsonl", sentences(30))
    windows = calibration_windows(path, tokenizer, 10, 32, seed=0)
    assert windows.describe()["begins_with_bos"] is bos
    assert bool((windows.tokens[:, 0] == BOS).all()) is bos
    assert not (windows.tokens[:, 1:] == BOS).any()


def test_calibration_windows_hold_whole_documents_in_a_row_each_once(tokenizer, tmp_path):
    documents = sentences(30)
    path = write_documents(tmp_path / "text.jsonl", documents)
    windows = calibration_windows(path, tokenizer, 20, 32, seed=0)
    assert windows.tokens.shape == (20, 32)
    text = tokenizer.decode(windows.tokens[:, 1:].flatten().tolist())
    *whole, begun = text.split("</s>")
    assert len(set(whole)) == len(whole)
    assert set(whole) <= set(documents)
    assert any(document.startswith(begun) for document in documents)
    drawn = {content_hash(document) for document in whole}
    assert drawn <= windows.documents <= set(map(content_hash, documents))


def test_documents_joined_by_text_make_one_packed_text(tokenizer):
    documents = sentences(3000)  # longer than one run of tokenization
    runs = list(pack(documents, tokenizer, "\n\n"))
    assert len(runs) > 1
    packed = [token for run in runs for token in run]
    assert tokenizer.decode(packed) == "\n\n".join(documents) + "\n\n"


def test_tokenizer_without_eos_separates_documents_by_a_blank_line():
    tokenizer = byte_tokenizer(eos=False)
    (packed,) = pack(["one", "two"], tokenizer, "eos")
    assert tokenizer.decode(packed) == "one\n\ntwo\n\n"


def test_packing_looks_at_every_document_a_few_times(tokenizer):
    looked = []

    class Counted(str):
        def __len__(self):
            looked.append(self)
            return super().__len__()

    documents = [Counted(f"{number}") for number in range(400)]
    (packed,) = pack(documents, tokenizer, "\n\n")
    assert packed == encode(tokenizer, "\n\n".join([*documents, ""]))
    assert len(looked) <= 4 * len(documents)


def test_cut_windows_does_not_care_how_the_text_is_divided_into_runs():
    ids = list(range(10, 45))
    runs = [ids[:1], [], ids[1:20], ids[20:]]
    expected = [[BOS, *ids[start : start + 7]] for start in range(0, 35, 7)]
    assert list(cut_windows(runs, 8, BOS)) == expected == list(cut_windows([ids], 8, BOS))


def test_set_that_is_too_small_says_how_many_windows_there_are(tokenizer, tmp_path):
    path = write_documents(tmp_path / "text.jsonl", ["x" * 99])  # with its EOS: 100 tokens
    assert len(calibration_windows(path, tokenizer, 4, 26, 0).tokens) == 4
    message = refusal(calibration_windows, path, tokenizer, 9, 26, 0)
    assert f"'{path}' holds 4 windows of 26 tokens, 9 were asked for" in message


@pytest.mark.parametrize(
    ("samples", "shares"), [(6, [2, 2, 2]), (7, [3, 2, 2]), (8, [3, 3, 2]), (2, [1, 1, 0])]
)
def test_mixtures_share_equally_with_the_remainder_to_the_first(
    samples, shares, tokenizer, tmp_path
):
    names = [
        write_documents(tmp_path / f"{letter}.jsonl", [letter * (600 + i) for i in range(3)])
        for letter in "abc"
    ]
    for windows in (
        calibration_windows(" , ".join(names), tokenizer, samples, 16, seed=0),
        evaluation_windows(",".join(names), tokenizer, samples, 16),
    ):
        rows = [tokenizer.decode(row[1:]) for row in windows.tokens.tolist()]
        assert [sum(letter in row for row in rows) for letter in "abc"] == shares
        assert windows.sources == tuple(names)
        assert len(rows) == samples


def test_sets_of_a_calibration_take_turns(tokenizer, tmp_path):
    names = [
        write_documents(tmp_path / f"{letter}.jsonl", [letter * (600 + i) for i in range(3)])
        for letter in "abc"
    ]
    windows = calibration_windows(",".join(names), tokenizer, 8, 16, seed=0)
    rows = [tokenizer.decode(row[1:]) for row in windows.tokens.tolist()]
    assert [next(letter for letter in "abc" if letter in row) for row in rows] == list("abcabcab")


def test_mixture_names_the_set_that_is_too_small(tokenizer, tmp_path):
    large = write_documents(tmp_path / "large.jsonl", sentences(50))
    small = write_documents(tmp_path / "small.jsonl", ["x" * 40])
    message = refusal(calibration_windows, f"{large},{small}", tokenizer, 20, 16, 0)
    assert f"'{small}' holds 2 windows" in message


# --------------------------------------------------------------------------- evaluation


def test_evaluation_drops_and_counts_documents_of_the_calibration_set(tokenizer, tmp_path):
    shared, own = sentences(20, "shared"), sentences(20, "own")
    calib = write_documents(tmp_path / "calib.jsonl", shared)
    reflowed = ["  ".join(document.split()) + "\n" for document in shared]
    held_out = write_documents(tmp_path / "held-out.jsonl", [*reflowed[:7], *own])
    total = sum(len(document.encode()) + 1 for document in shared)
    calibration = calibration_windows(calib, tokenizer, total // 31, 32, seed=0)
    assert calibration.documents == set(map(content_hash, shared))
    evaluation = evaluation_windows(held_out, tokenizer, 1000, 32, calibration.documents)
    assert evaluation.dropped_documents == evaluation.describe()["dropped_documents"] == 7
    assert evaluation.documents == set(map(content_hash, own))
    assert "shared" not in tokenizer.decode(evaluation.tokens.flatten().tolist())


def test_evaluation_on_the_calibration_set_itself_is_refused(tokenizer, tmp_path):
    path = write_documents(tmp_path / "text.jsonl", ["x" * 200])
    calibration = calibration_windows(path, tokenizer, 4, 32, seed=0)
    message = refusal(evaluation_windows, path, tokenizer, 4, 32, calibration.documents)
    assert "after 1 documents" in message
    assert "--eval-text" in message


def test_evaluation_takes_at_most_what_there_is(tokenizer, tmp_path):
    path = write_documents(tmp_path / "text.jsonl", ["x" * 99])
    assert len(evaluation_windows(path, tokenizer, 1000, 26).tokens) == 4


def test_standard_library_evaluates_on_nothing_it_calibrates_on(tokenizer):
    calibration = calibration_windows("stdlib", tokenizer, 100, 512, seed=0)
    evaluation = evaluation_windows("stdlib", tokenizer, 100, 512, calibration.documents)
    assert evaluation.dropped_documents == 0
    assert calibration.documents
    assert evaluation.documents
    assert not calibration.documents & evaluation.documents
    assert {part_of(d) for d in stdlib_documents() if content_hash(d) in evaluation.documents} == {
        "evaluation"
    }


def test_evaluation_windows_do_not_depend_on_the_seed(tokenizer):
    found = set()
    for seed in (0, 1):
        calibration = calibration_windows("stdlib", tokenizer, 4, 64, seed)
        found.add(evaluation_windows("stdlib", tokenizer, 8, 64, calibration.documents).sha256)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("calib", "expected"),
    [
        ("stdlib", "stdlib"),
        ("wikitext2", "wikitext2"),
        ("alpaca,c4", "c4"),
        ("alpaca", "stdlib"),
        ("./mine.jsonl", "stdlib"),
        ("owner/name", "stdlib"),
    ],
)
def test_default_held_out_text_is_that_of_the_first_set_that_has_some(calib, expected):
    assert default_evaluation(calib) == expected


# --------------------------------------------------------------------------- local files


def test_every_file_format_gives_the_same_documents(tmp_path):
    documents = ["One line.", "Two lines,\nhere is the second.", "Drei: äöü, 四.", "Last."]
    text = tmp_path / "set.txt"
    text.write_text("\n\n" + "\n \n\n".join(documents) + "\n", encoding="utf-8")
    write_documents(tmp_path / "set.jsonl", documents)
    write_parquet(tmp_path / "set.parquet", text=documents)
    for suffix in (".txt", ".jsonl", ".parquet"):
        plain = tmp_path / f"set{suffix}"
        zipped = tmp_path / f"set{suffix}.gz"
        zipped.write_bytes(gzip.compress(plain.read_bytes()))
        assert [document.strip() for document in documents_of(str(plain))] == documents
        assert documents_of(str(zipped)) == documents_of(str(plain))


@pytest.mark.parametrize(
    "text",
    [
        "one\n\ntwo\n\n",
        "\n \n = Title = \n \n text , more\nof it \n\t\n\n\nlast\n \n",
        "no blank line\nat all\n\n",
    ],
)
def test_documents_of_a_text_file_in_a_row_are_the_file(text, tmp_path):
    tokenizer, path = byte_tokenizer(bos=False), tmp_path / "set.txt"
    path.write_text(text)
    assert "".join(documents_of(str(path))) == text
    windows = evaluation_windows(str(path), tokenizer, 100, 1).tokens
    assert tokenizer.decode(windows.flatten()) == text


def test_the_last_block_of_a_text_file_does_not_run_into_another(tmp_path):
    path = tmp_path / "set.txt"
    for ending in ("", "\n"):
        path.write_text(f"one\n\n\ntwo{ending}")
        assert documents_of(str(path)) == ["one\n\n\n", "two\n\n"]


def test_file_with_windows_line_ends_and_byte_order_mark_reads_like_any_other(tmp_path):
    path = tmp_path / "set.txt"
    path.write_bytes("\ufeffone\r\nand more\r\n\r\ntwo\r\n".encode())
    assert documents_of(str(path)) == ["one\nand more\n\n", "two\n\n"]
    path = tmp_path / "set.jsonl"
    path.write_bytes('\ufeff{"text": "one"}\r\n\r\n{"text": "two"}\r\n'.encode())
    assert documents_of(str(path)) == ["one", "two"]


def test_duplicates_and_blank_documents_are_left_out(tmp_path):
    path = write_documents(tmp_path / "set.jsonl", ["a b", "", " \n", "a  b\n", "c", "a b"])
    assert documents_of(path) == ["a b", "c"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "yes", "content": "no", "title": "no"}, "yes"),
        ({"content": "yes", "title": "no"}, "yes"),
        ({"story": "yes", "id": 7, "tags": ["no"]}, "yes"),
        ("yes", "yes"),
    ],
)
def test_column_is_text_or_content_or_the_only_string(row, expected, tmp_path):
    assert documents_of(write_jsonl(tmp_path / "set.jsonl", [row])) == [expected]
    if isinstance(row, dict):
        columns = {name: [value] for name, value in row.items()}
        assert documents_of(write_parquet(tmp_path / "set.parquet", **columns)) == [expected]


@pytest.mark.parametrize("row", [{"title": "a", "body": "b"}, {"id": 7}, {"text": 7}, [1], None])
def test_row_without_a_text_column_is_refused_with_what_was_found(row, tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [row])
    message = refusal(documents_of, path)
    assert message.startswith("Expected ")
    assert f"line 1 of '{path}'" in message
    for column in row if isinstance(row, dict) else ():
        assert column in message


def test_row_whose_text_is_null_is_no_document_and_lends_no_other_column(tmp_path):
    rows = [{"text": "one", "url": "http://a"}, {"text": None, "url": "http://b"}]
    assert documents_of(write_jsonl(tmp_path / "set.jsonl", rows)) == ["one"]
    path = write_parquet(tmp_path / "set.parquet", text=["one", None], url=["http://a", "http://b"])
    assert documents_of(path) == ["one"]


def test_times_beside_the_text_need_not_be_any_that_python_knows(tmp_path):
    import pyarrow

    far = pyarrow.array([2**62]).cast(pyarrow.timestamp("us", tz="Mars/Phobos"))
    path = write_parquet(tmp_path / "set.parquet", text=["one"], seen=far)
    assert documents_of(path) == ["one"]


def test_text_that_is_no_valid_unicode_still_tokenizes(tokenizer, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "half a pair \\ud83d, and then much more text"}\n')
    assert len(calibration_windows(str(path), tokenizer, 2, 16, 0).tokens) == 2


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.txt.gz", "blank.txt"])
def test_empty_file_is_refused(name, tokenizer, tmp_path):
    path = tmp_path / name
    content = b"\n \n" if "blank" in name else b""
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    message = refusal(calibration_windows, str(path), tokenizer, 1, 16, 0)
    assert f"'{path}' holds 0 windows" in message
    assert "dropped" in refusal(evaluation_windows, str(path), tokenizer, 1, 16)


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "gone.parquet", "gone.jsonl.gz"])
def test_missing_file_is_refused(name, tmp_path):
    assert "does not exist" in refusal(resolve_source, str(tmp_path / name))


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("text\nhello\n")
    message = refusal(resolve_source, str(path))
    assert ".txt, .jsonl or .parquet" in message
    assert str(path) in message


@pytest.mark.parametrize("name", ["wikitext3", "", " , ", "./no/such", "/no/such/folder"])
def test_unknown_name_is_refused_with_the_names_there_are(name, tokenizer):
    message = refusal(calibration_windows, name, tokenizer, 1, 16, 0)
    for known in manifest():
        assert known in message


def broken_files() -> dict[str, bytes]:
    long = gzip.compress(bytes(range(256)) * 400)
    flipped = bytearray(gzip.compress("".join(f"{i * i} words\n" for i in range(5000)).encode()))
    for place in random.Random(0).sample(range(20, len(flipped)), 50):
        flipped[place] ^= 0x5A
    return {
        "no-gzip.txt.gz": b"plain text",
        "truncated.txt.gz": long[: len(long) // 2],
        "truncated.jsonl.gz": gzip.compress(b'{"text": "one"}\n' * 1000)[:-12],
        "flipped.txt.gz": bytes(flipped),
        "latin.txt": "Grüße".encode("latin-1"),
        "latin.jsonl": '{"text": "Grüße"}'.encode("latin-1"),
        "broken.jsonl": b'{"text": "one"}\n{"text": \n',
        "empty.parquet": b"",
        "text.parquet": b"this is no table at all",
        "text.parquet.gz": gzip.compress(b"this is no table at all"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_file_that_cannot_be_read_is_refused_by_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    message = refusal(documents_of, str(path))
    assert str(path) in message
    assert "xpected UTF-8 text" in message or "Expected JSON in line 2" in message


@pytest.mark.parametrize("name", ["set.jsonl", "set.txt", "set.jsonl.gz"])
def test_a_line_that_is_no_utf8_is_named(name, tmp_path):
    path = tmp_path / name
    content = b'{"text": "one"}\n' * 300 + '{"text": "Grüße"}\n'.encode("latin-1")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert f"UTF-8 text in line 301 of '{path}'" in refusal(documents_of, str(path))


def test_a_line_too_deep_to_read_is_named(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "one"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert f"line 2 of '{path}'" in refusal(documents_of, str(path))


def test_suffixes_may_be_capitals(tmp_path):
    write_jsonl(tmp_path / "set.JSONL", [{"text": "one"}])
    (tmp_path / "set.Txt.GZ").write_bytes(gzip.compress(b"one\n"))
    for name in ("set.JSONL", "set.Txt.GZ"):
        assert [document.strip() for document in documents_of(str(tmp_path / name))] == ["one"]


def test_a_name_longer_than_any_files_is_of_none(tmp_path):
    assert "does not exist" in refusal(resolve_source, str(tmp_path / f"{'x' * 5000}.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "is no file" in refusal(resolve_source, str(tmp_path / "folder.jsonl"))


TURNS = [("user", "How much is 3 + 4?"), ("assistant", "7")]
CHATS = {
    "openai": {"id": "a", "messages": [{"role": r, "content": c} for r, c in TURNS]},
    "sharegpt": {
        "id": "a",
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in TURNS
        ],
    },
    "prompt": {"prompt": TURNS[0][1], "completion": TURNS[1][1], "source": "b"},
    "alpaca": {"instruction": "How much is", "input": "3 + 4?", "output": "7"},
    "parts": {
        "messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]
    },
    "trl": {
        "prompt": [{"role": TURNS[0][0], "content": TURNS[0][1]}],
        "completion": [{"role": TURNS[1][0], "content": TURNS[1][1]}],
    },
}


@pytest.mark.parametrize("kind", CHATS)
def test_conversations_are_read_as_people_keep_them(kind, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [CHATS[kind]])
    (document,) = documents_of(path)
    asked = "How much is\n\n3 + 4?" if kind == "alpaca" else TURNS[0][1]
    assert document == f"user: {asked}\nassistant: 7"


def test_conversations_go_through_the_chat_template(tokenizer, tmp_path):
    from copy import deepcopy

    chatting = deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = write_jsonl(tmp_path / "chats.jsonl", [CHATS["openai"]] + [
        {"messages": [{"role": "user", "content": f"How much is {i}?"}]} for i in range(50)
    ])  # fmt: skip
    windows = calibration_windows(path, chatting, 1, 64, 0)
    assert "<user>How much is" in chatting.decode(windows.tokens[0])


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [{"content": "no role"}],
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_a_conversation_without_text_is_named_by_its_line(turns, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [CHATS["openai"], {"messages": turns}])
    assert f"column 'messages' of line 2 of '{path}'" in refusal(documents_of, path)


def test_further_input_that_is_no_text_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [{**CHATS["alpaca"], "input": 5}])
    assert f"line 1 of '{path}'" in refusal(documents_of, path)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tokenizer, tmp_path):
    from copy import deepcopy

    chatting = deepcopy(tokenizer)
    chatting.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools.') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    tool = {"messages": [{"role": "tool", "content": "x"}]}
    path = write_jsonl(tmp_path / "chats.jsonl", [CHATS["openai"], tool])
    message = refusal(calibration_windows, path, chatting, 1, 8, 0)
    assert f"the conversation in line 2 of '{path}'" in message
    assert "No tools" in message


def test_a_column_can_be_named(tmp_path):
    rows = [{"question_text": "one", "answer_text": "two"}]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    assert "name the one" in refusal(documents_of, path)
    assert documents_of(f"{path}:answer_text") == ["two"]
    assert "found columns answer_text, question_text" in refusal(documents_of, f"{path}:nothing")


@pytest.mark.parametrize(
    "row",
    [
        {"id": "conv_1"},
        {"uuid": "x", "turns": [["a"]]},
        {"url": "http://a", "score": 3},
        {"key": "doc-1"},
        {"name": "doc-1", "length": 3},
        {"docId": "doc-1", "input_ids": [1, 2]},
        {"file.name": "a.txt"},
        {"lang": "en", "dialogs": [["a"]]},
    ],
)
def test_identifiers_are_no_text(row, tmp_path):
    assert "Expected a column that is clearly the text" in refusal(
        documents_of, write_jsonl(tmp_path / "set.jsonl", [row])
    )


def test_truncated_parquet_is_refused_by_name(tmp_path):
    whole = Path(write_parquet(tmp_path / "whole.parquet", text=sentences(500)))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-100])
    assert str(cut) in refusal(documents_of, str(cut))


# --------------------------------------------------------------------------- named sets and the hub


def test_every_named_set_says_where_it_comes_from_and_on_what_terms():
    assert {"stdlib", "wikitext2", "c4", "ptb", "alpaca", "fineweb-edu"} <= set(manifest())
    for name, source in manifest().items():
        assert source.name == name
        assert source.licence
        assert source.licence != "unknown"
        assert source.stdlib != bool(source.dataset)
        if source.dataset:
            assert source.split
            assert source.column
            assert source.revision


def test_hub_name_is_divided_into_dataset_and_config():
    assert resolve_source("owner/name") == TextSource(
        name="owner/name", licence="unknown", join="eos", dataset="owner/name"
    )
    assert resolve_source("owner/name:part").dataset == "owner/name"
    assert resolve_source("owner/name:part").config == "part"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A working folder in which `owner/name` is a folder laid out as a dataset on the hub is."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # How long datasets waits for pyarrow's threads after it streamed a parquet file.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2, raising=False)
    return tmp_path


def lay_out(source: TextSource, splits: dict[str, list[str]]) -> None:
    """Write a set of the manifest into the working folder, with a decoy configuration."""
    root = Path(source.dataset)
    config = source.config or "default"
    lines = ["---", "configs:", "- config_name: decoy", "  data_files: decoy/*.parquet"]
    lines += [f"- config_name: {config}", "  data_files:"]
    for split, texts in splits.items():
        columns = {"other": ["instead"] * len(texts), source.column: texts}
        write_parquet(root / config / f"{split}-00000-of-00001.parquet", **columns)
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        lines += ["  default: true"] if split == list(splits)[-1] and not source.config else []
    write_parquet(root / "decoy" / "train.parquet", **{source.column: ["decoy"]})
    (root / "README.md").write_text("\n".join([*lines, "---", "# A set", ""]))


@pytest.mark.parametrize("name", [name for name in HUB_SETS if name != "wikitext2"])
def test_named_set_reads_its_config_split_and_column(name, hub):
    source = manifest()[name]
    held_out = source.evaluation_split or source.split
    texts = {source.split: sentences(60, "train"), held_out: sentences(60, "held-out")}
    lay_out(source, texts)
    calibration = documents_of(name, "calibration")
    evaluation = documents_of(name, "evaluation")
    assert set(calibration) <= set(texts[source.split])
    assert set(evaluation) <= set(texts[held_out])
    assert not set(calibration) & set(evaluation)
    if source.evaluation_split:
        assert (len(calibration), len(evaluation)) == (60, 60)
    else:
        assert {part_of(document) for document in evaluation} == {"evaluation"}
        assert set(calibration) | set(evaluation) == set(texts[source.split])


def test_wikitext_rows_are_joined_to_articles(hub):
    rows = ["", " = First = \n", "", " One . \n", " = = Part = = \n", "", " Two . \n"]
    rows += [" = = = Detail = = = \n", " Three . \n", " = Second = \n", "", " x = y = z \n"]
    lay_out(manifest()["wikitext2"], {"test": [" = Other = \n", " Four . \n"], "train": rows})
    first, second = documents_of("wikitext2")
    assert first == "".join(rows[1:9])
    assert second == "".join(rows[9:])
    assert documents_of("wikitext2", "evaluation") == [" = Other = \n Four . \n"]


def test_any_hub_dataset_by_name_streams_from_its_train_split(hub, tokenizer):
    texts = sentences(200)
    write_parquet(Path("owner/name/data/train-00000-of-00001.parquet"), content=texts)
    write_parquet(Path("owner/name/data/test-00000-of-00001.parquet"), content=["test"])
    calibration = calibration_windows("owner/name", tokenizer, 20, 64, seed=0)
    again = calibration_windows("owner/name", tokenizer, 20, 64, seed=0)
    other = calibration_windows("owner/name", tokenizer, 20, 64, seed=1)
    assert calibration.sha256 == again.sha256 != other.sha256
    evaluation = evaluation_windows("owner/name", tokenizer, 4, 64, calibration.documents)
    assert evaluation.dropped_documents == 0
    assert calibration.documents | evaluation.documents <= set(map(content_hash, texts))


def test_hub_dataset_with_a_config_reads_that_one(hub):
    source = TextSource("", "", "eos", dataset="owner/name", config="one", column="text")
    lay_out(source, {"train": ["right", "so right"]})
    found = documents_of("owner/name:one") + documents_of("owner/name:one", "evaluation")
    assert sorted(found) == ["right", "so right"]


def test_hub_dataset_that_needs_a_config_says_which_there_are(hub):
    source = TextSource("", "", "eos", dataset="owner/name", config="one", column="text")
    lay_out(source, {"train": ["right"]})
    message = refusal(documents_of, "owner/name")
    assert "'decoy', 'one'" in message
    assert "owner/name:config" in message
    assert "nope" in refusal(documents_of, "owner/name:nope")


def test_hub_dataset_without_the_split_says_which_there_are(hub):
    write_parquet(Path("owner/name/data/test-00000-of-00001.parquet"), text=["test"])
    message = refusal(documents_of, "owner/name")
    assert "train" in message
    assert "test" in message


@pytest.mark.parametrize("name", [*HUB_SETS, "owner/name", "owner/name:part"])
def test_hub_set_without_network_says_which_and_what_to_do(name, hub, tokenizer):
    message = refusal(calibration_windows, name, tokenizer, 1, 16, 0)
    assert resolve_source(name).dataset in message
    assert "network" in message
    assert "--calib stdlib" in message


def test_without_the_package_datasets_a_hub_set_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(documents_of, "owner/name")


def test_windows_record_what_repeats_them(tokenizer, tmp_path):
    path = write_documents(tmp_path / "text.jsonl", sentences(30))
    windows = calibration_windows(path, tokenizer, 4, 32, seed=0)
    assert windows.describe() == {
        "sources": [path],
        "samples": 4,
        "seq_len": 32,
        "begins_with_bos": True,
        "documents": len(windows.documents),
        "dropped_documents": 0,
        "sha256": windows.sha256,
    }
    json.dumps(windows.describe())
