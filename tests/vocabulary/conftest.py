"""Small tokenizers of every kind, laid out as hub folders are."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing, ByteLevel, Sequence, TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

DOCS = Path(__file__).parents[2] / "docs"
SAMPLE = (DOCS / "design.md").read_text()[
    :12000
] + "naïve café, Straße; 你好世界   ▁ \n\n\t 😀 don't"
LINES = SAMPLE.splitlines(keepends=True)
SIZE = 600
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ["bytes", "words", "fallback", "pieces", "unigram", "wordpiece"]


def byte_level(ignore_merges: bool = False) -> Tokenizer:
    """GPT-2's and SmolLM's kind; with `ignore_merges` and a pattern of its own, Llama-3's."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    if not ignore_merges:
        return core
    state = json.loads(core.to_str())
    # A word that no merges lead to, as tiktoken's ranks may hold one.
    state["model"]["vocab"]["Ġzyxwv"] = core.get_vocab_size()
    state["model"]["ignore_merges"] = True
    core = Tokenizer.from_str(json.dumps(state))
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+(?!\S)|[^\p{L}\p{N}]+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return core


def byte_fallback() -> Tokenizer:
    """Gemma's and Mistral's kind, the merges those that training found."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = BpeTrainer(vocab_size=SIZE - 256, max_token_length=12, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    learned = json.loads(core.to_str())["model"]
    vocab = [*SPECIAL, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    core.model = models.BPE(
        vocab={token: place for place, token in enumerate(vocab)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return core


def unigram() -> Tokenizer:
    """T5's and XLNet's kind: characters that training did not see are unknown."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(LINES, trainer)
    return core


def wordpiece() -> Tokenizer:
    """BERT's kind."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    return core


def save(core: Tokenizer, folder: Path) -> None:
    """A tokenizer with added tokens of several manners, as transformers saves one."""
    core.add_special_tokens([token for token in SPECIAL if core.token_to_id(token) is None])
    core.add_special_tokens([AddedToken("<|turn|>", rstrip=True, normalized=False)])
    core.add_tokens(
        [AddedToken("Straße", normalized=True, single_word=True), AddedToken("  ", lstrip=True)]
    )
    bos, eos = (core.token_to_id(token) for token in ("<s>", "</s>"))
    if isinstance(core.model, models.WordPiece):
        core.post_processor = BertProcessing(("</s>", eos), ("<s>", bos))
    else:
        around = TemplateProcessing(
            single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", bos), ("</s>", eos)]
        )
        core.post_processor = Sequence([ByteLevel(trim_offsets=False), around])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)
    fast.save_pretrained(folder)


def save_sentencepiece(folder: Path) -> None:
    """Llama-2's kind: a sentencepiece model, and what transformers makes of it."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=written,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)


@pytest.fixture(scope="session", params=KINDS)
def hub_folder(request, tmp_path_factory) -> Path:
    """A folder with the files of a tokenizer and the configs of a model, without weights."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "pieces":
        save_sentencepiece(folder)
    else:
        make = {
            "bytes": byte_level,
            "words": lambda: byte_level(ignore_merges=True),
            "fallback": byte_fallback,
            "unigram": unigram,
            "wordpiece": wordpiece,
        }
        save(make[request.param](), folder)
    write_configs(folder)
    return folder


def write_configs(folder: Path) -> None:
    """A model's configs that name the ids of the folder's tokenizer."""
    vocab = AutoTokenizer.from_pretrained(folder).get_vocab()
    unknown, bos, eos = (vocab[token] for token in SPECIAL)
    config = {"model_type": "llama", "vocab_size": 704, "bos_token_id": bos, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    generation = {"eos_token_id": [eos, bos], "suppress_tokens": [unknown], "bos_token_id": bos}
    (folder / "generation_config.json").write_text(json.dumps(generation))
