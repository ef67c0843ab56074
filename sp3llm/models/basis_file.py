"""The basis of the residual stream, kept beside a compressed model for what comes after."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sp3llm.errors import UserError, reason

# No `.safetensors`: vLLM and others take every file of that name for weights.
BASIS = "sp3llm.basis"


def write_basis(folder: Path, basis_DK: Tensor) -> None:
    """Keep `T`, `(D, K)`, which takes the dense stream to the compressed one (docs/design.md 2), in
    float32 and safetensors' format.
    """
    (folder / BASIS).write_bytes(save({"basis_DK": basis_DK.float().cpu().contiguous()}))


def read_basis(folder: Path) -> Tensor:
    """`T`, `(D, K)`, float32.

    Raises UserError if the folder holds none.
    """
    try:
        return load_file(folder / BASIS)["basis_DK"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"Expected the basis of the compressed model in '{folder / BASIS}', found none "
            f"({reason(error, 80)}): compress the model again with this version of sp3llm, or "
            "give --hidden-weight 0."
        ) from error
