"""One split for all text: a document's content decides what it may be used for."""

import hashlib

PARTS = ("train", "calibration", "evaluation")
_TRAIN_PERCENT, _CALIBRATION_PERCENT = 60, 25  # the remaining 15 are for evaluation
# One training document in this many is not trained on, but decides when to stop.
_STOPPING_SHARE = 16


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
