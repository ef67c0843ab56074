"""What may be asked for an encoder, and what for a decoder only."""

from sp3llm.errors import UserError
from sp3llm.models.families import Family
from sp3llm.options import CompressConfig


def check_encoder(family: Family, settings: CompressConfig, compresses: bool) -> None:
    """Raise UserError where settings are not for a model of that family; `compresses`: where it is
    to be calibrated, too.
    """
    is_encoder = family.task_head is not None
    if not is_encoder and settings.task is not None:
        raise UserError(
            f"Expected an encoder for --task, found a {family.architecture}, which is calibrated "
            "on text: leave it out, or name text with --calib."
        )
    if is_encoder and settings.vocab_from is not None:
        raise UserError(
            f"Expected a decoder for --vocab-from, found a {family.architecture}: leave it out."
        )
    if is_encoder and family.task_head.answer is None and settings.recover_steps:
        raise UserError(
            f"Expected an encoder that answers a task's rows for --recover-steps, found a "
            f"{family.architecture}, which has no head: leave it out."
        )
    if is_encoder and compresses and settings.task is None:
        raise UserError(
            f"Expected --task for a {family.architecture}, which is calibrated on a task's rows, "
            "found none: name it, as --task sst2, or a file, as --task train.jsonl:sentence,label."
        )
