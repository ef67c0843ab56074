"""The objectives there are."""

from collections.abc import Mapping
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.objectives.feature_extraction import FEATURE_EXTRACTION
from sp3llm.models.objectives.question_answering import QUESTION_ANSWERING
from sp3llm.models.objectives.schema import Objective
from sp3llm.models.objectives.sequence_classification import SEQUENCE_CLASSIFICATION

_OBJECTIVES = (CAUSAL_LM, SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING, FEATURE_EXTRACTION)


def objective_of(architecture: str) -> Objective:
    """The objective of a stock class, `LlamaForCausalLM` or the like; one of a family's."""
    return next(o for o in _OBJECTIVES if architecture.endswith(o.architecture_suffix))


def task_objective(config: Mapping[str, Any], name: str) -> Objective:
    """The objective of a model that answers rows of a task, by its `config.json`; `name` is the
    model's, to show.

    Raises UserError if it is for something else.
    """
    architecture = str(next(iter(config.get("architectures") or ()), None))
    for objective in _OBJECTIVES:
        if objective.labels and architecture.endswith(objective.architecture_suffix):
            return objective
    suffixes = " or ".join(o.architecture_suffix for o in _OBJECTIVES if o.labels)
    raise UserError(
        f"Expected a model for a task (architecture ...{suffixes} in config.json), found "
        f"{architecture} in '{name}': fine-tune it on the task first."
    )
