"""Rotate and cut a group of a post-norm model (docs/design.md 3.15).

The norms sit on the stream, so that nothing folds into the readers and the norms keep weights: of
`T^T diag(g) T`, which the residual path would have, a stock norm holds the diagonal. The stream's
mean is kept, and with it everything that readers see of it.
"""

from collections.abc import Mapping

from torch import Tensor

from sp3llm.compression.projection import Projection, project_table, project_writer
from sp3llm.compression.reading import norm_of
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.diagonal import diagonal_in
from sp3llm.models.families import Family, Group


def project_post_norm(
    family: Family, group: Group, tensors: Mapping[str, Tensor], projection: Projection
) -> dict[str, Tensor]:
    """Transform one group; the result has names and shapes of the small model."""
    if group.name == "embeddings":
        return _project_embeddings(family, tensors, projection.basis_DK)
    if group.name == "head":
        return _project_task_head(family, tensors, projection.basis_DK)
    basis_DK, projected = projection.basis_DK, dict(tensors)
    for site in group.sites:
        for reader in site.readers:
            name = f"{group.prefix}{reader}.weight"
            projected[name] = project_reader(tensors[name], basis_DK)
        projected |= project_norm(family, f"{group.prefix}{site.norm}", tensors, basis_DK)
    for writer in group.writers:
        for name in (f"{group.prefix}{writer}.weight", f"{group.prefix}{writer}.bias"):
            projected[name] = project_writer(tensors[name], basis_DK)
    return projected


def project_reader(weight_FD: Tensor, basis_DK: Tensor) -> Tensor:
    """A reader's matrix: `W T / c`."""
    return weight_FD.to(basis_DK) @ basis_DK / stream_scale(basis_DK)


def project_norm(
    family: Family, norm: str, tensors: Mapping[str, Tensor], basis_DK: Tensor
) -> dict[str, Tensor]:
    """A norm on the stream, by its full name: the diagonal of `T^T diag(g) T`, and `c b T`."""
    weight_D, bias_D = norm_of(family, norm, tensors, basis_DK)
    return {
        f"{norm}.weight": diagonal_in(basis_DK, weight_D) - family.norm_offset,
        f"{norm}.bias": stream_scale(basis_DK) * (bias_D @ basis_DK),
    }


def _project_embeddings(
    family: Family, tensors: Mapping[str, Tensor], basis_DK: Tensor
) -> dict[str, Tensor]:
    tables = {name for name, axes in family.embeddings.items() if len(axes) == 2}
    projected = {name: project_table(tensors[name], basis_DK) for name in tables}
    return {**projected, **project_norm(family, family.embedding_norm, tensors, basis_DK)}


def _project_task_head(
    family: Family, tensors: Mapping[str, Tensor], basis_DK: Tensor
) -> dict[str, Tensor]:
    """The head with the units that its answer weighs most, as many as the stream is wide."""
    head, projected = family.task_head, dict(tensors)
    if head.units is not None:
        weight_UD = tensors[f"{head.units}.weight"].to(basis_DK)
        weighs = weight_UD if head.answer is None else tensors[f"{head.answer}.weight"].T
        strength_U = weighs.to(basis_DK).square().sum(1)
        kept_U = strength_U.topk(basis_DK.shape[1]).indices.sort().values
        projected |= keep_units(family, tensors, kept_U)
        projected[f"{head.units}.weight"] = project_reader(weight_UD[kept_U], basis_DK)
    elif head.answer is not None:
        name = f"{head.answer}.weight"
        projected[name] = project_reader(tensors[name], basis_DK)
    return projected


def keep_units(family: Family, tensors: Mapping[str, Tensor], kept_U: Tensor) -> dict[str, Tensor]:
    """A head's tensors with some of its units only, by number."""
    head, remaining = family.task_head, dict(tensors)
    for part in ("weight", "bias"):
        name = f"{head.units}.{part}"
        remaining[name] = tensors[name][kept_U.to(tensors[name].device)]
    if head.answer is not None:
        name = f"{head.answer}.weight"
        remaining[name] = tensors[name][:, kept_U.to(tensors[name].device)]
    return remaining
