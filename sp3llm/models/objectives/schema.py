"""What an objective is: the stock class, the batches, what comes after the last layer, the loss.

Whatever streams, trains or measures a model asks its objective, and so need not know whether text
is continued, classified or searched. Fields are plain functions; a second objective is a second
value of `Objective`, in a file of its own, and a line in `catalogue`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sp3llm.text.labels import Labels


@dataclass(frozen=True)
class Recipe:
    """What a recovery does where nothing else is said."""

    steps: int | None
    """Optimizer steps; None: as many as `epochs` take."""
    epochs: int
    """How often training rows are gone through, where that says how many steps there are."""
    lr_of_weights: float
    """Peak learning rate of all weights of a model one wide."""
    far: float | None
    """Nats from the teacher times tokens a step below which the rate falls by the square; None: it
    does not.
    """
    temperature: float
    """At which model and teacher are compared."""
    kl_weight: float
    """Of their divergence."""
    hidden_weight: float
    """Of the error of the residual stream."""
    stop_windows: int
    """Windows or rows, at most, that decide when to stop."""
    patience: int
    """Checks without a better loss before training stops; ten are all that there are."""


@dataclass(frozen=True)
class Objective:
    """What a model is for.

    A batch is what the objective's own functions draw: for causal language models token ids,
    `(windows, tokens)`, of packed windows; for tasks `text.examples.Examples`. Both have a length
    and a shape, give rows by number, and go to a device.
    """

    name: str
    """`causal-lm`."""
    architecture_suffix: str
    """What the names of its stock classes end with."""
    auto_class: str
    """The transformers class that finds them by config."""
    task_type: str
    """What peft calls it."""
    pipeline: str
    """What the hub calls it."""
    calibration_windows: Callable[..., Any]
    """Text to calibrate on; called as `text.windows.calibration_windows` is."""
    training_windows: Callable[..., Any]
    """Text to learn from; called as `text.windows.training_windows` is."""
    join: Callable[[Sequence[Any]], Any]
    """One batch of several, one after the other."""
    inputs: Callable[[Any], dict[str, Any]]
    """What the stock model is called with for a batch."""
    real_tokens: Callable[[Any], Any]
    """Which tokens of a batch are no padding, 1 for those, `(rows, tokens)`; None: all."""
    in_rows: Callable[[Any, Any], Any]
    """A batch for a model whose embeddings are other rows: token ids looked up in a table."""
    of_rows: Callable[[Any, Any], Any]
    """Logits of a model whose embeddings are other rows, for ours: `(logits, rows)`."""
    logits: Callable[[Any, Any], Any]
    """The logits in the stock model's output for a batch, `(output, batch)`; a distribution each
    along the last dimension, or values."""
    scored: Callable[[Any], Any]
    """Of the logits of a batch those that a label stands against: all that losses look at."""
    divergence: Callable[[Any, Any, float], Any]
    """How far scored logits are from a teacher's, at a temperature; a tensor with gradients."""
    learning_loss: Callable[[Any, Any], Any]
    """Mean loss of scored logits on a batch's own labels, to learn by; a tensor with gradients."""
    recipe: Recipe
    """Of a recovery."""
    labels: Callable[[Mapping[str, Any]], Labels] | None = None
    """What a model of a `config.json` predicts of a text; None: the text itself, its tokens."""
    states_are_stream: bool = False
    """The hidden states that the stock class returns are its residual stream in front of all layers
    and behind the last; else a norm comes between."""
    evaluation_windows: Callable[..., Any] | None = None
    """Held-out text; called as `text.windows.evaluation_windows` is. None, here and below: what is
    reported is how well a task's rows are answered (`evaluation.task_scores`)."""
    losses: Callable[..., Any] | None = None
    """Losses of a streamed model behind its last layer, `(model, head, stream, batch)`, float64, in
    nats, a row a window: the independent units of every standard error."""
    divergences: Callable[..., Any] | None = None
    """How far what streamed models say is from what the dense one does, `(smalls, dense)`, each
    behind its last layer (`models.head.End`): one tensor a small model, float64, in nats, a row a
    window."""
    loss_gradients: Callable[..., Any] | None = None
    """Gradients of the loss on labels drawn from the model itself, `(model, head, stream,
    windows)`: by the stream behind the last layer, and by the output of the final norm."""
    losses_in_memory: Callable[..., Any] | None = None
    """Losses of a model in memory on one window, `(model, window, device)`, as `losses`' are."""
    merit: Callable[[Any], float] | None = None
    """The figure that a table shows, from losses."""
    merit_name: str = ""
    """What that figure is called."""

    def stock_class(self) -> Any:
        """The transformers class that the model loads as."""
        import transformers

        return getattr(transformers, self.auto_class)
