"""What an objective is: the stock class, the batches, what comes after the last layer, the loss.

Whatever streams, trains or measures a model asks its objective, and so need not know whether text
is continued, classified or searched. Fields are plain functions; a second objective is a second
value of `Objective`, in a file of its own, and a line in `catalogue`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """What a model is for.

    A batch is what the objective's own functions draw: for causal language models token ids,
    `(windows, tokens)`, of packed windows.
    """

    name: str
    """`causal-lm`."""
    architecture_suffix: str
    """What the names of its stock classes end with."""
    auto_class: str
    """The transformers class that finds them by config."""
    task_type: str
    """What peft calls it."""
    calibration_windows: Callable[..., Any]
    """Text to calibrate on; called as `text.windows.calibration_windows` is."""
    evaluation_windows: Callable[..., Any]
    """Held-out text; called as `text.windows.evaluation_windows` is."""
    training_windows: Callable[..., Any]
    """Text to learn from; called as `text.windows.training_windows` is."""
    inputs: Callable[[Any], dict[str, Any]]
    """What the stock model is called with for a batch."""
    scored: Callable[[Any], Any]
    """Of the logits of a batch those that a label stands against: all that losses look at."""
    learning_loss: Callable[[Any, Any], Any]
    """Mean loss of scored logits on a batch's own labels, to learn by; a tensor with gradients."""
    losses: Callable[..., Any]
    """Losses of a streamed model behind its last layer, `(model, head, stream, batch)`, float64, in
    nats, a row a window: the independent units of every standard error."""
    divergences: Callable[..., Any]
    """How far what a streamed model says is from what the dense one does, `(small, dense)`, each
    behind its last layer (`models.head.End`): float64, in nats, a row a window."""
    loss_gradients: Callable[..., Any]
    """Gradients of the loss on labels drawn from the model itself, `(model, head, stream,
    windows)`: by the stream behind the last layer, and by the output of the final norm."""
    losses_in_memory: Callable[..., Any]
    """Losses of a model in memory on one window, `(model, window, device)`, as `losses`' are."""
    merit: Callable[[Any], float]
    """The figure that a table shows, from losses."""
    merit_name: str
    """What that figure is called."""

    def stock_class(self) -> Any:
        """The transformers class that the model loads as."""
        import transformers

        return getattr(transformers, self.auto_class)
