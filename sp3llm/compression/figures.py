"""What the models of a compression are measured to be worth: on text, or on a task's rows."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sp3llm.compression.job import Figures, Job

if TYPE_CHECKING:
    from torch import Tensor

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.vocabulary.same_text import HeldOut


def text_figures(
    job: Job, held_out: "HeldOut", losses: "Tensor", dense_losses: "Tensor"
) -> Figures:
    """From the losses of both models on the held-out windows, `(windows, tokens - 1)`, nats."""
    from sp3llm.maths.paired import excess_log_perplexity

    nats, dense_nats = held_out.small_nats(losses), held_out.dense_nats(dense_losses)
    merit, excess = job.objective.merit, excess_log_perplexity(nats, dense_nats)
    return Figures(merit(dense_nats), merit(nats), excess)


def stock_model(job: Job, checkpoint: "Checkpoint") -> Any:
    """The stock model of a checkpoint, whole, in float32; what was just written has no config.json
    yet.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[job.family.model_type].from_dict(deepcopy(dict(checkpoint.config)))
    model = job.objective.stock_class().from_pretrained(
        checkpoint.folder, config=config, dtype="float32"
    )
    return model.requires_grad_(False).eval().to(job.execution.device)
