"""How byte-pair encoding comes by a token.

BPE starts from characters and merges, again and again, the leftmost of the adjacent pairs of the
lowest rank. Within the span of a token that comes out, a pair that is taken is the lowest of the
whole word, so the lowest of the span: what happens there is what BPE makes of the token's own
characters, in any text. A vocabulary that holds all that this passes through, with all the old
merges that it can still make, in their old order, takes the same steps wherever the tokens that
come out are kept: each step of the old one is still possible, and none that is comes before it.
"""

from collections.abc import Mapping
from itertools import pairwise

Ranks = Mapping[tuple[str, str], int]
"""By pair of tokens: the place of their merge in the list, the first to be made being 0."""


def passed_through(token: str, ranks: Ranks) -> set[str]:
    """What BPE passes through from the characters of a token to the token, both included.

    Empty where merges do not lead there: only a whole word that is looked up (`ignore_merges`) is
    ever such a token.
    """
    parts = list(token)
    passed = {*parts, token}
    while len(parts) > 1:
        pairs = [ranks.get(pair) for pair in pairwise(parts)]
        possible = [rank for rank in pairs if rank is not None]
        if not possible:
            return set()
        place = pairs.index(min(possible))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        passed.add(parts[place])
    return passed
