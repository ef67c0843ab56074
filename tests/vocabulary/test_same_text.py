"""Two vocabularies predict exactly the same text, to the byte."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sp3llm.text.tokenizer import adds_bos
from sp3llm.text.windows import evaluation_windows
from sp3llm.vocabulary.files import restricted_files
from sp3llm.vocabulary.kept import Kept, kept_of
from sp3llm.vocabulary.same_text import SameText, held_out_text, same_text
from sp3llm.vocabulary.tokenizers import Vocabulary, closed, read_vocabulary
from tests.vocabulary.conftest import BYTES
from tests.vocabulary.test_vocabulary import ROWS, TEXTS

Pair = tuple[Vocabulary, PreTrainedTokenizerFast]
LONG = st.lists(TEXTS, min_size=4, max_size=12).map(" ".join)


@pytest.fixture(scope="session")
def whole(hub_folder) -> Pair:
    return read_vocabulary(hub_folder), AutoTokenizer.from_pretrained(hub_folder)


def restricted(whole: Pair, wanted: set[int]) -> tuple[Kept, PreTrainedTokenizerFast]:
    vocabulary, _ = whole
    kept = kept_of(closed(vocabulary, wanted & vocabulary.tokens.keys()), ROWS)
    content = restricted_files(vocabulary, kept).contents["tokenizer.json"]
    core = Tokenizer.from_str(content.decode())
    return kept, PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def windows_of(tokenizer: PreTrainedTokenizerFast, text: str, seq_len: int, folder: Path):
    path = folder / "text.jsonl"
    path.write_text(json.dumps({"text": text}))
    return evaluation_windows(str(path), tokenizer, 100, seq_len, words=True)


def said(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """What tokens say, special ones by their names; a byte's own token says the byte."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    prefix = model.get("continuing_subword_prefix") if model["type"] == "WordPiece" else None
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return b"".join(
        bytes([BYTES.index(token)])
        if token in BYTES
        else (token if prefix is None else token.removeprefix(prefix)).encode()
        for token in tokens
    )


def without_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    parsed["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parsed)), bos_token="<s>", eos_token="</s>"
    )


def predicted(same: SameText, windows: torch.Tensor, row: int) -> tuple[list[int], list[int]]:
    """Ids that count in a window: dense and restricted."""
    dense = windows[row, 1:][same.dense_counted_WS[row]].tolist()
    return dense, same.tokens_WR[row, 1:][same.counted_WR[row]].tolist()


@pytest.mark.parametrize("bos", [True, False])
@settings(deadline=None, max_examples=15)
@given(text=LONG, seq_len=st.integers(3, 12), data=st.data())
def test_what_is_predicted_is_the_same_text(whole, bos, tmp_path_factory, text, seq_len, data):
    vocabulary, dense = whole
    dense = dense if bos else without_bos(dense)
    text += " the end" * seq_len
    wanted = data.draw(st.sets(st.sampled_from(sorted(vocabulary.tokens)), max_size=200))
    _, small = restricted(whole, wanted)
    small = small if bos else without_bos(small)
    windows = windows_of(dense, text, seq_len, tmp_path_factory.mktemp("text"))
    assert windows.begins_with_bos == adds_bos(dense) == adds_bos(small)
    short = seq_len + 20  # of some windows not all fits
    for positions in (10_000, short):
        same = same_text(windows, dense, small, positions)
        assert same.tokens_WR.shape[1] <= positions
        for row in range(len(windows.tokens)):
            before, after = predicted(same, windows.tokens, row)
            assert said(small, after) == said(dense, before)
            if positions > short:
                assert len(before) == seq_len - 1
        assert same.dense_tokens == int(same.dense_counted_WS.sum())
        assert same.tokens == int(same.counted_WR.sum())


@settings(deadline=None, max_examples=15)
@given(text=LONG, others=st.sets(st.integers(0, 500), max_size=40), data=st.data())
def test_a_whole_text_becomes_what_the_restricted_tokenizer_makes_of_it(
    whole, tmp_path_factory, text, others, data
):
    _, dense = whole
    ids = dense(text, add_special_tokens=False)["input_ids"]
    assume(text.strip() and ids)
    few = data.draw(st.sets(st.sampled_from(ids)))
    begins = adds_bos(dense)
    length = begins + len(ids) + 1
    windows = windows_of(dense, text, length, tmp_path_factory.mktemp("text"))
    for wanted in (few | others, set(ids)):
        kept, small = restricted(whole, wanted)
        same = same_text(windows, dense, small, 10_000)
        found = small(text, add_special_tokens=False)["input_ids"]
        bos, eos = map(kept.new_id, (dense.bos_token_id, dense.eos_token_id))
        if begins:  # else a boundary stays behind the first token
            assert same.tokens_WR.tolist() == [[bos, *found, eos]]
    # All tokens are kept now, wherever windows cut the text.
    some = windows_of(dense, text, max(2, len(ids) // 3), tmp_path_factory.mktemp("text"))
    same = same_text(some, dense, small, 10_000)
    ids = some.tokens.flatten().tolist()
    assert same.tokens_WR.flatten().tolist() == [kept.new_id(old) for old in ids]
    assert same.counted_WR.all()
    assert same.dense_counted_WS.all()


def test_bytes_are_those_of_the_text(whole, tmp_path):
    vocabulary, dense = whole
    text = "A naïve café 你好 says it,\twith 😀 and <s>specials</s>."
    ids = dense(text, add_special_tokens=False)["input_ids"]
    windows = windows_of(dense, text, len(ids) + adds_bos(dense) + 1, tmp_path)
    same = same_text(windows, dense, restricted(whole, set())[1], 10_000)
    tokens = [vocabulary.tokens[i] for i in ids]
    plain = text.replace("<s>", "").replace("</s>", "")
    if any("Ġ" in token for token in tokens):
        assert same.bytes == len(plain.encode())
    elif set(BYTES) <= vocabulary.ids.keys():  # a space goes before parts of the text
        assert abs(same.bytes - len(plain.encode())) <= 3


def test_sums_are_over_what_counts_and_a_dense_token_is_the_unit():
    counted = torch.tensor([[False, True, True, False], [False, True, True, True]])
    dense_counted = torch.tensor([[True, True], [True, False]])
    same = SameText(torch.zeros(2, 5).long(), counted, dense_counted, bytes=6)
    losses = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 3.0, 4.0, 5.0]])
    assert (same.dense_tokens, same.tokens) == (3, 5)
    assert same.nats(losses).mean().item() == pytest.approx(15 / 3)
    assert same.nats(losses).flatten().tolist() == pytest.approx([3 / 1.5, 12 / 1.5])
    assert same.dense_nats(losses[:, 2:]).mean().item() == pytest.approx((2 + 9 + 4) / 3)
    # Two bits a dense token, two bytes a dense token.
    assert same.describe({"dense": 4.0})["bits_a_byte"] == {"dense": pytest.approx(1.0)}


def test_one_tokenizer_is_one_reading(whole, tmp_path):
    _, dense = whole
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten")
    arguments = (evaluation_windows, str(path), (dense, dense), 4, 8, frozenset(), 64)
    held_out = held_out_text(*arguments)
    assert held_out.same is None
    assert held_out.small_tokens is held_out.tokens
    losses = torch.rand(len(held_out.tokens), 7)
    assert held_out.small_nats(losses) is held_out.dense_nats(losses) is losses
    assert held_out.describe(dense=2.0) is None
