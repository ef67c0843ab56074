"""Models of sentencepiece (`tokenizer.model`), read and written as the messages that they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sp3llm.vocabulary.kept import Kept

# The ids that a model's training settings name, each of which may be negative: there is none.
_NAMED = ("unk_id", "bos_id", "eos_id", "pad_id")


def read_pieces(path: Path) -> Any:
    """The message in a model of sentencepiece; None where the file is something else, such as the
    ranks of tiktoken.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces else None


def restricted_pieces(model: Any, ids: Mapping[str, int], kept: Kept) -> bytes | None:
    """A model of sentencepiece with the pieces that are kept; None where its pieces do not have the
    ids that the tokenizer's tokens have.

    Sentencepiece merges whatever pair makes a piece, the one of the highest score first, and
    scores stay: it restricts as byte-pair encoding with merges does (`merging`).
    """
    from sentencepiece import sentencepiece_model_pb2

    if any(ids.get(piece.piece) != place for place, piece in enumerate(model.pieces)):
        return None
    restricted = sentencepiece_model_pb2.ModelProto(
        pieces=[piece for place, piece in enumerate(model.pieces) if kept.new_id(place) is not None]
    )
    # Left out is `self_test_data`, if there is any: sentences, and the pieces of each.
    for name in ("trainer_spec", "normalizer_spec", "denormalizer_spec"):
        if model.HasField(name):
            getattr(restricted, name).CopyFrom(getattr(model, name))
    settings = restricted.trainer_spec
    settings.vocab_size = len(restricted.pieces)
    for name in _NAMED:
        old = getattr(settings, name)
        if old >= 0:
            new = kept.new_id(old)
            setattr(settings, name, -1 if new is None else new)
    return restricted.SerializeToString()
