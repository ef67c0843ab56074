"""Tiny encoders with tokenizers of words, and tiny labelled files, for several files of tests."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

GOOD, BAD = ("good", "fine", "warm", "clever"), ("bad", "dull", "cold", "stale")
OTHERS = ("the", "film", "is", "a", "plot", "and", "its", "end", "was", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CLASSES = {
    "sequence": BertForSequenceClassification,
    "answers": BertForQuestionAnswering,
    "masked": BertForMaskedLM,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with BERT's special tokens and types."""
    words = [*SPECIAL, *GOOD, *BAD, *OTHERS, *map(str, range(60))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_encoder(folder: Path, kind: str = "sequence", **settings):
    """A tiny BERT and its tokenizer in a folder; returns the model."""
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
            **settings,
        }
    )
    torch.manual_seed(0)
    model = CLASSES[kind](config).eval()
    model.save_pretrained(folder)
    return model


def opinions(count: int, seed: int) -> list[dict]:
    """Rows that say something good or bad, label 1 or 0, each but once."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = draw.randrange(2)
        words = [*draw.choices(OTHERS, k=draw.randrange(2, 9)), str(number % 60)]
        words.insert(draw.randrange(len(words)), draw.choice((BAD, GOOD)[label]))
        rows.append({"sentence": " ".join(words) + f" {seed}", "label": label})
    return list({row["sentence"]: row for row in rows}.values())


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """The rows as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opinion_folder(folder: Path, train: int = 96, validation: int = 24) -> Path:
    """A copy of sst2, as it were."""
    write_jsonl(folder / "train.jsonl", opinions(train, 1))
    write_jsonl(folder / "validation.jsonl", opinions(validation, 2))
    return folder
