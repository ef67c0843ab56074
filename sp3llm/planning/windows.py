"""How long a window of tokens is."""

from collections.abc import Mapping
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import Family, setting

# Papers on pruning calibrate and evaluate on windows of this many tokens; rows of a task have so
# many at most.
_USUAL_LENGTH, _USUAL_ROW = 2048, 128


def window_length(family: Family, config: Mapping[str, Any], asked: int | None) -> int:
    """Tokens a window: `asked` (`--seq-len`), else 2048, or the model's positions if fewer; of an
    encoder, which reads rows of a task, 128.

    Raises UserError if more are asked for than the model has positions.
    """
    positions = setting(family, config, "max_position_embeddings")
    if asked is not None and asked > positions:
        raise UserError(
            f"Expected --seq-len of at most {positions}, the model's positions, found {asked}: "
            "give a smaller one."
        )
    usual = _USUAL_LENGTH if family.task_head is None else _USUAL_ROW
    return asked or min(usual, positions)
