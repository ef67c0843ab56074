"""A restricted tokenizer says what the whole one says, in the tokens that it has."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sp3llm.errors import UserError
from sp3llm.vocabulary.choosing import chosen_by
from sp3llm.vocabulary.counting import token_counts
from sp3llm.vocabulary.files import check_restricted, restricted_files
from sp3llm.vocabulary.ids import named_ids, restricted_ids
from sp3llm.vocabulary.kept import Kept, kept_of
from sp3llm.vocabulary.tokenizers import Vocabulary, closed, most_wanted, read_vocabulary
from sp3llm.vocabulary.wanted import wanted_tokens
from tests.vocabulary.conftest import (
    SAMPLE,
    SPECIAL,
    byte_level,
    save_sentencepiece,
    wordpiece,
    write_configs,
)

ROWS = 704  # of the dense table, a few of which no token has
WORDS = sorted(set(SAMPLE.split()))
KNOWN = " ".join(WORDS[:20])
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(WORDS),
        st.sampled_from([" ", "  ", "   ", "\n", "\t", "▁", "<|turn|>", "Straße", "<s>", " zyxwv"]),
        st.text(max_size=12),
        st.text(alphabet="aeé世你😀 '▁", max_size=8),
    ),
    max_size=8,
).map("".join)


def write_restricted(vocabulary: Vocabulary, kept: Kept, folder: Path) -> None:
    """What `compress` will do: copies, with what depends on ids in place of the originals."""
    files = restricted_files(vocabulary, kept)
    for path in vocabulary.folder.iterdir():
        if path.name not in files.left_out:
            shutil.copy(path, folder)
    for name, content in files.contents.items():
        (folder / name).write_bytes(content)
    config = json.loads((vocabulary.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(restricted_ids(config, kept)))


@pytest.fixture(scope="session")
def pair(hub_folder) -> tuple[Vocabulary, Tokenizer]:
    """A folder's vocabulary, and its tokenizer as the `tokenizers` library runs it."""
    loaded = AutoTokenizer.from_pretrained(hub_folder)
    return read_vocabulary(hub_folder), loaded.backend_tokenizer


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


@settings(deadline=None, max_examples=80)
@given(
    own=st.lists(TEXTS, max_size=6),
    others=st.lists(TEXTS, max_size=6),
    more=st.sets(st.integers(0, 500), max_size=20),
)
def test_any_text_survives_and_text_of_kept_tokens_keeps_them(pair, own, others, more):
    vocabulary, dense = pair
    wanted = {*more.intersection(vocabulary.tokens), *chain(*encoded(dense, own))}
    kept = kept_of(closed(vocabulary, wanted), ROWS)
    content = restricted_files(vocabulary, kept).contents["tokenizer.json"]
    small = Tokenizer.from_str(content.decode())
    texts = [*own, *others]
    for before, after in zip(encoded(dense, texts), encoded(small, texts), strict=True):
        for skip in (True, False):
            decoded = dense.decode(before, skip_special_tokens=skip)
            assert small.decode(after, skip_special_tokens=skip) == decoded
        new = [kept.new_id(old) for old in before]
        if None not in new:
            assert after == new


@pytest.fixture
def small_kept(pair) -> Kept:
    """What a few words need."""
    vocabulary, dense = pair
    return kept_of(closed(vocabulary, dense.encode(KNOWN).ids), ROWS)


def test_transformers_loads_a_restricted_folder(pair, small_kept, tmp_path):
    vocabulary, _ = pair
    write_restricted(vocabulary, small_kept, tmp_path)
    dense, small = (AutoTokenizer.from_pretrained(path) for path in (vocabulary.folder, tmp_path))
    check_restricted(small, vocabulary, small_kept)
    assert type(small) is type(dense)
    assert small.chat_template == dense.chat_template
    assert small.special_tokens_map == dense.special_tokens_map
    for texts in ([KNOWN], [KNOWN, KNOWN]):  # alone, and as a pair
        new_ids = [small_kept.new_id(old) for old in dense(*texts)["input_ids"]]
        assert small(*texts)["input_ids"] == new_ids
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert config["vocab_size"] == small_kept.rows
    assert config["pad_token_id"] is None
    assert config["eos_token_id"] == small.eos_token_id
    assert generation["eos_token_id"] == [small.eos_token_id, small.bos_token_id]
    assert generation["suppress_tokens"] == [small.unk_token_id]


def test_a_tokenizer_that_does_not_load_as_rewritten_is_refused(pair, small_kept, tmp_path):
    vocabulary, _ = pair
    write_restricted(vocabulary, small_kept, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][0]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    small = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="Expected the tokenizer in"):
        check_restricted(small, vocabulary, small_kept)


def test_the_unknown_token_costs_what_it_did(tmp_path):
    """Unigram reckons its score from the least likely token's, which no text need use."""
    scores = {"qb": -25, "b": -25, "c": -25, "d": -25, "bcd": -1, "z": -25, "zz": -100}
    core = Tokenizer(models.Unigram([("<unk>", 0), *scores.items()], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path)
    kept = kept_of(closed(vocabulary, [vocabulary.ids["bcd"]]), 8)
    small = Tokenizer.from_str(
        restricted_files(vocabulary, kept).contents["tokenizer.json"].decode()
    )
    assert core.encode("qbcd").tokens == small.encode("qbcd").tokens == ["qb", "c", "d"]


def test_sentencepiece_says_the_same_of_a_rewritten_model(tmp_path):
    """What llama.cpp and releases of transformers before 5 read of such a folder."""
    save_sentencepiece(tmp_path)
    write_configs(tmp_path)
    vocabulary = read_vocabulary(tmp_path)
    path = str(tmp_path / "tokenizer.model")
    dense = sentencepiece.SentencePieceProcessor(model_file=path)
    kept = kept_of(closed(vocabulary, dense.encode(KNOWN)), ROWS)
    content = restricted_files(vocabulary, kept).contents["tokenizer.model"]
    small = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert small.vocab_size() == len(kept.old_ids)
    assert small.encode(KNOWN) == [kept.new_id(old) for old in dense.encode(KNOWN)]
    assert (small.unk_id(), small.bos_id(), small.eos_id(), small.pad_id()) == (0, 1, 2, -1)
    assert small.decode(small.encode(SAMPLE)) == dense.decode(dense.encode(SAMPLE))


def without_tokenizer_json(kind: str, folder: Path) -> None:
    """The files that hub folders of older models have: OPT's, Llama-2's, BERT's."""
    if kind == "llama":
        save_sentencepiece(folder)
        names = {"tokenizer_class": "LlamaTokenizer"}
    else:
        core = byte_level() if kind == "opt" else wordpiece()
        core.add_special_tokens(SPECIAL)
        core.model.save(
            str(folder)
        )  # without the added tokens, which GPT-2's kind has in vocab.json
        if kind == "opt":
            (folder / "vocab.json").write_text(json.dumps(core.get_vocab()))
        names = {"tokenizer_class": "GPT2Tokenizer" if kind == "opt" else "BertTokenizer"}
    (folder / "tokenizer.json").unlink(missing_ok=True)
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    if kind == "bert":
        special |= {
            "pad_token": "<s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "mask_token": "<s>",
        }
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **special}))
    write_configs(folder)


@pytest.mark.parametrize("kind", ["opt", "llama", "bert"])
def test_folders_without_a_tokenizer_json(kind, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "small").mkdir()
    without_tokenizer_json(kind, tmp_path / "dense")
    vocabulary = read_vocabulary(tmp_path / "dense")
    dense = AutoTokenizer.from_pretrained(tmp_path / "dense")
    ids = dense(KNOWN)["input_ids"]
    kept = kept_of(closed(vocabulary, ids), ROWS)
    assert len(kept.old_ids) < len(vocabulary.ids)
    write_restricted(vocabulary, kept, tmp_path / "small")
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    check_restricted(small, vocabulary, kept)
    assert small(KNOWN)["input_ids"] == [kept.new_id(old) for old in ids]
    assert small.decode(small(SAMPLE)["input_ids"]) == dense.decode(dense(SAMPLE)["input_ids"])


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_vocabulary(folder)
    return str(error.value)


def test_what_cannot_be_rewritten_is_refused_with_the_reason(hub_folder, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    assert "found the model WordLevel" in refusal(tmp_path)

    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== 1\n")  # tiktoken's, by that name
    assert "found tokenizer.model alone" in refusal(tmp_path)

    for setting, reason in [
        ({"dropout": 0.1}, "found BPE with dropout"),
        ({"end_of_word_suffix": "</w>"}, "found BPE that marks the parts of words"),
    ]:
        core = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", **setting))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tmp_path)
        assert reason in refusal(tmp_path)


def test_ids_in_a_file_that_are_not_the_tokens_are_no_base(tmp_path):
    without_tokenizer_json("llama", tmp_path)
    vocabulary = read_vocabulary(tmp_path)
    shifted = {token: token_id + 1 for token, token_id in vocabulary.ids.items()}
    vocabulary = replace(vocabulary, ids=shifted)
    with pytest.raises(UserError, match="found ids in tokenizer"):
        restricted_files(vocabulary, kept_of(closed(vocabulary, ()), ROWS))


def test_files_that_cannot_follow_are_left_out_with_a_line(hub_folder, tmp_path):
    shutil.copytree(hub_folder, tmp_path, dirs_exist_ok=True)
    for name in ("tekken.json", "qwen.tiktoken", "tokenizer.model.v3"):
        (tmp_path / name).write_text("{}")
    vocabulary = read_vocabulary(tmp_path)
    files = restricted_files(vocabulary, kept_of(closed(vocabulary, ()), ROWS))
    assert set(files.left_out) == {"tekken.json", "qwen.tiktoken", "tokenizer.model.v3"}
    assert all(line.startswith(name) for name, line in files.left_out.items())


def test_counts_are_of_what_documents_become(pair):
    vocabulary, _ = pair
    tokenizer = AutoTokenizer.from_pretrained(vocabulary.folder)
    counts_V = token_counts(tokenizer, iter(WORDS), ROWS)
    expected = Counter(chain(*tokenizer(WORDS, add_special_tokens=False)["input_ids"]))
    assert {token: count for token, count in enumerate(counts_V.tolist()) if count} == expected
    with pytest.raises(UserError, match="vocab_size 3"):
        token_counts(tokenizer, WORDS, 3)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_most_wanted_are_closed_and_within_the_size(pair, data):
    vocabulary, _ = pair
    few = st.dictionaries(st.integers(0, ROWS - 1), st.integers(1, 9), max_size=60)
    counts_V = torch.zeros(ROWS, dtype=torch.int64)
    for token_id, count in data.draw(few).items():
        counts_V[token_id] = count
    everything = most_wanted(vocabulary, counts_V, None)
    named = set(counts_V.nonzero().flatten().tolist()) & vocabulary.tokens.keys()
    assert set(everything.old_ids) == closed(vocabulary, named)
    assert list(everything.old_ids) == sorted(everything.old_ids)
    assert everything.rows % 64 == 0
    least = len(closed(vocabulary, ()))
    size = data.draw(st.integers(least, len(everything.old_ids)))
    kept = most_wanted(vocabulary, counts_V, size)
    assert len(kept.old_ids) <= size
    assert set(kept.old_ids) == closed(vocabulary, kept.old_ids)
    # Whatever is passed by needs more room than there was, or is less wanted than what is not.
    for token in named.difference(kept.old_ids):
        at_least = {t for t in named if (counts_V[t], -t) >= (counts_V[token], -token)}
        assert len(closed(vocabulary, at_least)) > size
    with pytest.raises(UserError, match=f"at least {least} tokens"):
        most_wanted(vocabulary, counts_V, least - 1)


def test_a_short_text_counts_as_much_as_a_long_one(tmp_path, pair):
    vocabulary, _ = pair
    (tmp_path / "short.txt").write_text(WORDS[0])
    (tmp_path / "long.txt").write_text(" ".join(WORDS[1:] * 50))
    names = f"{tmp_path / 'short.txt'},{tmp_path / 'long.txt'}"
    both = wanted_tokens(names, vocabulary.folder, ROWS)
    short, long = (wanted_tokens(name, vocabulary.folder, ROWS) for name in names.split(","))
    assert torch.equal(both.counts, short.counts + long.counts)
    assert torch.allclose(both.shares, (short.shares + long.shares) / 2)
    assert math.isclose(both.shares.sum(), 1)
    (tmp_path / "long.txt").write_text("")
    with pytest.raises(UserError, match="long"):
        wanted_tokens(names, vocabulary.folder, ROWS)


def test_room_for_more_than_a_text_uses_goes_to_the_tokenizers_first_tokens(tmp_path, pair):
    vocabulary, _ = pair
    (tmp_path / "text.txt").write_text(WORDS[0])
    wanted = wanted_tokens(str(tmp_path / "text.txt"), vocabulary.folder, ROWS)
    used = set(chosen_by(vocabulary, wanted, None).kept.old_ids)
    assert used == closed(vocabulary, wanted.counts.nonzero().flatten().tolist())
    size = (len(used) + len(vocabulary.tokens)) // 2
    kept = set(chosen_by(vocabulary, wanted, size).kept.old_ids)
    assert used < kept
    assert len(kept) == size
    for token in sorted(vocabulary.tokens.keys() - kept):  # no room for what it needs as well
        earlier = closed(vocabulary, used | {t for t in vocabulary.tokens if t <= token})
        assert len(earlier) > size


@pytest.mark.parametrize("hub_folder", ["bytes"], indirect=True)
def test_whatever_stands_between_the_blocks_of_a_text_is_counted(tmp_path, hub_folder):
    text = "\n \n\n\n".join(WORDS) + "\n\n"
    (tmp_path / "text.txt").write_text(text)
    wanted = wanted_tokens(str(tmp_path / "text.txt"), hub_folder, ROWS)
    tokenizer = AutoTokenizer.from_pretrained(hub_folder)
    used = set(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert used == set(wanted.counts.nonzero().flatten().tolist())


def test_tokens_beyond_the_table_are_refused(pair):
    vocabulary, _ = pair
    last = max(vocabulary.tokens)
    with pytest.raises(UserError, match=f"with the id {last} and vocab_size {last}"):
        most_wanted(vocabulary, torch.zeros(last, dtype=torch.int64), None)


def test_tables_are_padded_to_a_multiple_and_never_beyond_the_dense_one():
    assert kept_of(range(65), 1000).rows == 128
    assert kept_of(range(65), 1000, multiple=192).rows == 192
    assert kept_of(range(100), 101).rows == 101
    assert kept_of([4, 2], 7) == Kept((2, 4), 7)


def test_every_id_of_a_config_follows():
    kept = kept_of([2, 5, 7, 9], 1000)
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 5,
        "bos_token_id": 5,
        "eos_token_id": [7, 2],
        "pad_token_id": -1,
        "decoder_start_token_id": 999,  # of the table's padding
        "suppress_tokens": [9, 999],
        "bad_words_ids": [[5, 7], [9]],
        "forced_decoder_ids": [[1, 7]],
        "sequence_bias": [[[9, 2], -1.5]],
        "use_cache": True,
    }
    assert named_ids(config) == {2, 5, 7, 9, 999}
    assert restricted_ids(config, kept) == {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 5,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": -1,
        "decoder_start_token_id": None,
        "suppress_tokens": [3],
        "bad_words_ids": [[1, 2], [3]],
        "forced_decoder_ids": [[1, 2]],
        "sequence_bias": [[[3, 0], -1.5]],
        "use_cache": True,
    }


def test_ids_that_a_class_assumes_are_named():
    """A Llama whose config.json says nothing begins with 1 and ends with 2."""
    config = {"model_type": "llama", "vocab_size": 1000}
    assert named_ids(config) == {1, 2}
    kept = kept_of([2, 1, 9], 1000)
    assert restricted_ids(config, kept) == {
        "model_type": "llama",
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
