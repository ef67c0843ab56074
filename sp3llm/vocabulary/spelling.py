"""How tokens that do not stay are spelled in those that do."""

from collections.abc import Sequence
from typing import Any

import torch

from sp3llm.maths.spelling import Spelling


def spelling_of(whole: Any, small: Any, rows: Sequence[int]) -> Spelling:
    """The spelling of the tokens of one tokenizer, `whole`, in those of another, which has some of
    them and is one of the tokenizers library (`text.tokenizer.has_backend`); `rows` are by row of
    the small tables that of the whole ones (`restricting.shared_rows`).

    Tokens that the small one cannot spell have none.
    """
    model = small.backend_tokenizer.model
    small_ids, pieces = small.get_vocab(), {}
    for token, token_id in whole.get_vocab().items():
        if token not in small_ids:
            spelled = [small_ids.get(piece.value) for piece in model.tokenize(token)]
            if None not in spelled and len(spelled) > 1:
                pieces[token_id] = spelled
    return Spelling.of(torch.tensor(rows), len(small_ids), pieces)
