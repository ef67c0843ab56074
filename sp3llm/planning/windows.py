"""How long a window of tokens is."""

from collections.abc import Mapping
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family, setting
from sp3llm.text.tasks import CLASSES, SPAN, usual_length

# Papers on pruning calibrate and evaluate on windows of this many tokens.
_USUAL_LENGTH = 2048


def window_length(family: Family, config: Mapping[str, Any], asked: int | None) -> int:
    """Tokens a window: `asked` (`--seq-len`), else 2048, or the model's positions if fewer; of an
    encoder, which reads rows of a task, at most what those of its task usually have.

    Raises UserError if more are asked for than the model has positions.
    """
    positions = setting(family, config, "max_position_embeddings")
    if asked is not None and asked > positions:
        raise UserError(
            f"Expected --seq-len of at most {positions}, the model's positions, found {asked}: "
            "give a smaller one."
        )
    return asked or min(_usual(family), positions)


def _usual(family: Family) -> int:
    head = family.task_head
    if head is None:
        return _USUAL_LENGTH
    # A head that answers by the tokens of a text says where in it the answer stands.
    answers_in_text = head.answer is not None and not head.first_only
    return usual_length(SPAN if answers_in_text else CLASSES)
