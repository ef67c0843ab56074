"""An old address: what was here is in `sp3llm.reporting`. For scripts written before that."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.reporting import origins
from sp3llm.reporting.record import read_record

if TYPE_CHECKING:
    from torch import Tensor


def held_out_tokens(record: Any, folder: Path) -> "Tensor":
    """The evaluation windows of the run that wrote `folder`, `(windows, tokens)`; its record is
    read from there, whatever was parsed of it.
    """
    del record
    return origins.held_out_tokens(read_record(folder), folder)
