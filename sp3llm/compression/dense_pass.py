"""One pass over the dense model: what it is asked for, and what it adds up."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.progress import Progress
from torch import Tensor

from sp3llm.compression.dense_runs import DenseRuns
from sp3llm.compression.statistics import FisherSums, SiteSlots
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import Family, Group
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.objectives.schema import Objective
from sp3llm.models.shapes import Shape
from sp3llm.models.stream import LayeredModel
from sp3llm.planning.needs import GRADIENT_TOKENS
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import Journal
from sp3llm.text.batches import real_tokens, rows_of
from sp3llm.text.examples import Examples


@dataclass(frozen=True)
class DensePass:
    """What `measuring.measure_dense` is asked for, and what it adds up."""

    dense: Checkpoint
    family: Family
    calibration: Tensor | Examples
    evaluation: Tensor | Examples | None
    moments: str
    basis: str
    predicts: bool
    """Whether what shapes lose is to be predicted, for which gradients are taken."""
    gaps: str | None
    """What stands for layers that go: `bridged`, what the refit can put there, or `cut`, nothing;
    None: no layer goes. What layers are worth then takes gradients to measure."""
    least_units: Mapping[str, int]
    """By the axis that a writer reads: the fewest of its units, neurons or KV groups, that any
    shape to choose from keeps, and by `HEAD_DIM` the smallest head; only of axes along which a
    shape is cut, and where nothing is predicted, only FFN neurons."""
    execution: Execution
    progress: Progress | None
    journal: Journal
    slots: SiteSlots
    """Moments and metrics of all sites so far, added to in place."""
    fisher: FisherSums
    """What the loss's gradients say so far, added to in place."""
    original: Checkpoint
    """With all of its vocabulary, of which `dense` may have some: what the evaluation is about."""
    runs: DenseRuns | None = None
    """Where what the layers leave of the calibration windows is kept; None: it is not."""
    judging: int = 0
    """How many of the last calibration windows tell what shapes lose: judged by text that neurons
    are chosen by, a shape with fewer looks better than it is."""

    @property
    def layers(self) -> list[Group]:
        """Groups of all layers."""
        return families.groups(self.family, self.dense.config)[1:-1]

    @property
    def shape(self) -> Shape:
        """The dense model's."""
        return Shape.of(self.family, self.dense.config)

    @property
    def takes_gradients(self) -> bool:
        """Whether the loss's gradients are taken."""
        return self.basis == "gradient" or self.predicts or self.gaps is not None

    def model(self, checkpoint: Checkpoint) -> LayeredModel:
        """The dense model, with some or all of its vocabulary, without weights."""
        return LayeredModel.of(checkpoint.config, self.family, self.objective, self.execution)

    @property
    def objective(self) -> Objective:
        """What the model is for."""
        return objective_of(self.family.architecture)

    def embeddings(self, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        """The dense model's embedding tables, of some or all of its vocabulary."""
        group = families.groups(self.family, checkpoint.config)[0]
        return checkpoint.read(group.parameters)

    def first_windows(self, count: int) -> list[int]:
        """Which of the first `count` calibration windows are this process's: its own first ones."""
        local_windows = self.execution.local_windows(*self.calibration.shape)
        return local_windows[local_windows < count].tolist()

    def traced_windows(self) -> list[int]:
        """Which windows of this process loss gradients are taken on."""
        return self.first_windows(self._traced_count)

    @property
    def _traced_count(self) -> int:
        """How many windows hold the tokens that loss gradients are taken on, one at least."""
        return max(1, GRADIENT_TOKENS * len(self.calibration) // real_tokens(self.calibration))

    @property
    def traced_tokens(self) -> int:
        """In the windows of all processes that loss gradients are taken on."""
        return real_tokens(rows_of(self.calibration, slice(0, self._traced_count)))
