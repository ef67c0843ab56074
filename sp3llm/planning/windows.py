"""How long a window of tokens is, and how many there are."""

from collections.abc import Mapping
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family, setting
from sp3llm.text.tasks import CLASSES, SPAN, usual_length

# Papers on pruning calibrate and evaluate on windows of this many tokens.
_USUAL_LENGTH = 2048
# So many tokens tell how sure a model may be, in no more than one window for so many fitted ones.
_TOKENS_THAT_TELL, _FITTED_A_WINDOW = 2048, 16


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


def windows_that_tell(windows: int, seq_len: int) -> int:
    """How many windows of a length tell how sure a model may be (docs/design.md 3.16), beside those
    that it is fitted to.
    """
    return min(-(-_TOKENS_THAT_TELL // seq_len), windows // _FITTED_A_WINDOW)


def _usual(family: Family) -> int:
    head = family.task_head
    if head is None:
        return _USUAL_LENGTH
    # A head that answers by the tokens of a text says where in it the answer stands.
    answers_in_text = head.answer is not None and not head.first_only
    return usual_length(SPAN if answers_in_text else CLASSES)
