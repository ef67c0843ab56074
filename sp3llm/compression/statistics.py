"""What the basis is made from: second moments of the dense stream, and what errors in it cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.projection import HeadMoments
from sp3llm.errors import UserError
from sp3llm.maths.moments import add_second_moment, column_sums
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import Saved
from sp3llm.runtime.processes import Ranks


@dataclass(frozen=True)
class Moments:
    """Second moments of the dense stream, float64."""

    sites_DD: tuple[Tensor, ...]
    """Mean second moments, summed over neighbouring read sites; in the order of the stream."""
    metrics_DD: tuple[Tensor, ...] = ()
    """What an error in the normalised stream costs there; nothing for principal components."""
    head_DD: Tensor | None = None
    """Mean second moment of what the head reads."""
    heads: tuple[HeadMoments, ...] = ()
    """Of every layer, where the width is heads times head size."""
    fisher: "Fisher | None" = None
    """What the loss's gradients say of errors; None where they were not taken."""
    layers_L: Tensor | None = None
    """What goes with each layer, nats a token (`compression.depth`); None: none is to go."""
    curves: Mapping[str, Tensor] = field(default_factory=dict)
    """By the axis that a writer reads, what all layers' writers lose with some of their units,
    after a refit: rows of the number of units, falling, and nats a token, `(points, 2)`."""
    dropped_OLG: Tensor | None = None
    """Of every layer's FFN the neurons that go, int64, in the order in which they do: by all the
    text that is looked at, and, where some of it tells what shapes lose, without that; None: none
    is to go, or the refit chooses."""
    columns: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)
    """What `basis_choice` has found of these: by hidden size, and the axes that all begin from."""

    def total(self) -> Tensor:
        """Sum over all sites, `(D, D)`."""
        return sum(self.sites_DD[1:], self.sites_DD[0].clone())


@dataclass(frozen=True)
class Fisher:
    """Fisher information of the stream, mean over tokens: an error with second moment `E` costs
    `tr(A E) / 2` nats a token.
    """

    sites_DD: tuple[Tensor, ...]
    """For errors of the normalised stream at the sites, seen by these only; summed over
    neighbouring sites as `Moments.sites_DD` are."""
    head_DD: Tensor
    """That of the final norm alone."""
    behind_DD: tuple[Tensor, ...]
    """For errors of the stream behind a writer, relative to its root mean square there, which all
    that follows sees; mean over neighbouring writers, in the order of the stream."""

    def behind(self, writer: int, writers: int) -> Tensor:
        """For a writer by its number among all `writers`."""
        return self.behind_DD[writer * len(self.behind_DD) // writers]


@dataclass(frozen=True)
class FisherSums:
    """Running sums of what `Fisher` has, added to in place."""

    sites_DD: list[Tensor]
    head_DD: Tensor
    behind_DD: list[Tensor]
    layers_L: Tensor
    """What `Moments.layers_L` is, of the layers that were measured so far."""
    sites: int

    @staticmethod
    def of(sites: int, most: int, layers: int, width: int, execution: Execution) -> "FisherSums":
        """Zeros, for so many read sites, the head's among them; otherwise as `SiteSlots.of`."""

        def zeros(count: int) -> list[Tensor]:
            return [
                torch.zeros(width, width, dtype=torch.float64, device=execution.device)
                for _ in range(count)
            ]

        behind_DD = zeros(min(most, sites - 1))
        layers_L = torch.zeros(layers, dtype=torch.float64, device=execution.device)
        return FisherSums(zeros(min(most, sites)), zeros(1)[0], behind_DD, layers_L, sites)

    def add_site(self, site: int, metric_DD: Tensor) -> None:
        """Add a site's metric."""
        self.sites_DD[site * len(self.sites_DD) // self.sites] += metric_DD

    def add_behind(self, writer: int, metric_DD: Tensor) -> None:
        """Add the metric behind a writer, by its number among all writers, as many as sites before
        the head's.
        """
        writers, slots = self.sites - 1, len(self.behind_DD)
        slot = writer * slots // writers
        members = sum(other * slots // writers == slot for other in range(writers))
        self.behind_DD[slot] += metric_DD / members

    def finished(self) -> Fisher:
        """The sums as they are now."""
        return Fisher(tuple(self.sites_DD), self.head_DD, tuple(self.behind_DD))

    def pack(self) -> dict[str, Tensor]:
        """As named tensors; `restore` is the inverse."""
        named = {"fisher.head": self.head_DD, "layers": self.layers_L}
        for of, tensors in (("sites", self.sites_DD), ("behind", self.behind_DD)):
            named |= {f"fisher.{of}.{i}": tensor for i, tensor in enumerate(tensors)}
        return named

    def restore(self, named: Mapping[str, Tensor]) -> None:
        """Set the sums to those that `pack` has named."""
        for name, mine in self.pack().items():
            mine.copy_(named[name])

    def restore_from(self, saved: Saved | None) -> bool:
        """Set the sums to those of a step of the journal; whether there is one."""
        if saved is not None:
            self.restore(saved.tensors)
        return saved is not None

    def check_finite(self) -> None:
        """Raises UserError if anything overflowed."""
        if not all(torch.isfinite(metric_DD).all() for metric_DD in self.pack().values()):
            raise UserError(
                "The gradients of the loss hold NaN or infinity: use --basis readers and a shape "
                "by hand, or --dtype float32, or an undamaged copy of the checkpoint."
            )


@dataclass
class MomentSum:
    """Running sums of vectors and of their outer products, float64, by blocks of channels: `B`
    blocks of `W` channels each, such as heads, of which only the products within a block count.
    """

    squares_BWW: Tensor
    sums_BW: Tensor
    count: int = 0

    @staticmethod
    def of(blocks: int, width: int, execution: Execution) -> "MomentSum":
        """Sums of no vectors."""
        squares_BWW = torch.zeros(
            blocks, width, width, dtype=torch.float64, device=execution.device
        )
        return MomentSum(squares_BWW, torch.zeros_like(squares_BWW[..., 0]))

    def add(self, x: Tensor) -> None:
        """Add vectors, `(..., B W)`, floating."""
        blocks, width = self.sums_BW.shape
        x_NBW = x.reshape(-1, blocks, width)
        for block, squares_WW in enumerate(self.squares_BWW):
            add_second_moment(squares_WW, x_NBW[:, block])
        self.sums_BW += column_sums(x_NBW.flatten(1)).view(blocks, width)
        self.count += len(x_NBW)

    def over(self, ranks: Ranks) -> "MomentSum":
        """The same with what every process has seen."""
        count = self.sums_BW.new_tensor([self.count])
        ranks.all_reduce_(self.squares_BWW, self.sums_BW, count)
        return MomentSum(self.squares_BWW, self.sums_BW, int(count.item()))

    def moments(self) -> Tensor:
        """Mean second moments, `(B, W, W)`."""
        return self.squares_BWW / self.count

    def means(self) -> Tensor:
        """Means, `(B, W)`."""
        return self.sums_BW / self.count


@dataclass(frozen=True)
class SiteSlots:
    """Running sums of the moments and metrics of all read sites, neighbouring sites in one sum."""

    sums: list[Tensor]
    metrics: list[Tensor]
    sites: int

    @staticmethod
    def of(sites: int, most: int, width: int, execution: Execution) -> "SiteSlots":
        """Zeros, `(width, width)`: `most` sums, or one a site where there are fewer sites."""

        def zeros() -> list[Tensor]:
            return [
                torch.zeros(width, width, dtype=torch.float64, device=execution.device)
                for _ in range(min(most, sites))
            ]

        return SiteSlots(zeros(), zeros(), sites)

    def of_site(self, site: int) -> int:
        """Number of the sum that a site is added to."""
        return site * len(self.sums) // self.sites

    def restore(self, named: Mapping[str, Tensor]) -> None:
        """Set the sums to those that `pack` has named."""
        for name, totals in (("sites_DD", self.sums), ("metrics_DD", self.metrics)):
            for index, total_DD in enumerate(totals):
                total_DD.copy_(named[f"{name}.{index}"])

    def check_finite(self) -> None:
        """Raises UserError if anything overflowed, or there is nothing to find a basis of."""
        if not all(torch.isfinite(total_DD).all() for total_DD in self.sums):
            raise UserError(
                "The second moments of the stream do not fit float32: its activations are extreme; "
                "use --moments normalised, or a checkpoint in float64."
            )
        if not any(total_DD.trace() > 0 for total_DD in self.sums):
            raise UserError(
                "Expected a residual stream to compress, found nothing but zeros where it is read: "
                "its embeddings are zero, or so large that their squares overflow, so get an "
                "undamaged copy of the checkpoint."
            )


def pack(moments: Moments) -> dict[str, Tensor]:
    """Moments as named tensors, for the journal, which has the Fisher information apart from them;
    `unpack` is the inverse.
    """
    named: dict[str, Tensor | None] = {"head": moments.head_DD}
    for name in ("sites_DD", "metrics_DD"):
        named |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(moments, name))}
    for layer, head in enumerate(moments.heads):
        named |= {f"heads.{layer}.{of.name}": getattr(head, of.name) for of in fields(head)}
    named |= {f"curves.{axis}": tensor for axis, tensor in moments.curves.items()}
    named |= {"layers": moments.layers_L, "dropped by text": moments.dropped_OLG}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def unpack(named: Mapping[str, Tensor], execution: Execution) -> Moments:
    """Moments from the tensors that `pack` named, copied to the device that computes."""

    def under(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}."
        return {
            name.removeprefix(start): tensor.to(execution.device, copy=True)
            for name, tensor in named.items()
            if name.startswith(start)
        }

    def listed(prefix: str) -> tuple[Tensor, ...]:
        by_index = under(prefix)
        return tuple(by_index[str(i)] for i in range(len(by_index)))

    layers = {int(name.split(".")[1]) for name in named if name.startswith("heads.")}
    heads = tuple(HeadMoments(**under(f"heads.{layer}")) for layer in sorted(layers))
    head_DD, layers_L, dropped_OLG = (
        None if name not in named else named[name].to(execution.device, copy=True)
        for name in ("head", "layers", "dropped by text")
    )
    return Moments(
        sites_DD=listed("sites_DD"),
        metrics_DD=listed("metrics_DD"),
        head_DD=head_DD,
        heads=heads,
        layers_L=layers_L,
        curves=under("curves"),
        dropped_OLG=dropped_OLG,
    )
