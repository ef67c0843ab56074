"""The objectives there are."""

from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.objectives.schema import Objective

_OBJECTIVES = (CAUSAL_LM,)


def objective_of(architecture: str) -> Objective:
    """The objective of a stock class, `LlamaForCausalLM` or the like; one of a family's."""
    return next(o for o in _OBJECTIVES if architecture.endswith(o.architecture_suffix))
