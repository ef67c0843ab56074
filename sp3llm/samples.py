"""An old address: what was here is in `sp3llm.reporting`. For scripts written before that."""

from sp3llm.reporting.origins import held_out_tokens

__all__ = ["held_out_tokens"]
