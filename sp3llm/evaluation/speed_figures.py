"""Figures of `sp3llm bench`: what one model did, and both beside what their shapes promise."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A figure measured several times."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """The median and the quartiles; a single value is all three."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def times(self, factor: float) -> "Spread":
        """The same in another unit, of which `factor` make one of this."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Pass:
    """One prompt and what was generated after it, timed; seconds."""

    prefill: float
    """The prompt's forward, until its next token is chosen."""
    first_token: float
    """From the call to the first token on the host, the cache included."""
    decode: float
    """All other tokens."""


@dataclass(frozen=True)
class Measured:
    """One model at one batch size and prompt length."""

    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    first_token_seconds: Spread
    peak_memory_bytes: int | None
    """Weights, KV cache and activations; what the process itself takes is not in it. None for
    compiled models on a GPU, whose graphs keep their memory out of sight."""


@dataclass(frozen=True)
class SpeedUp:
    """A ratio of speeds beside the one that shapes promise."""

    measured: Spread
    """Small over dense, of measurements next to each other."""
    promised: float | None
    """Dense over small, of FLOPs or bytes; None: the family is unknown."""

    @property
    def realised(self) -> float | None:
        """The median of what was measured over what was promised."""
        return None if self.promised is None else self.measured.median / self.promised


@dataclass(frozen=True)
class Cell:
    """Both models at one batch size and prompt length."""

    batch_size: int
    prompt_length: int
    dense: Measured
    small: Measured
    prefill: SpeedUp
    decode: SpeedUp

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        values = asdict(self)
        for name in ("prefill", "decode"):
            values[name]["realised"] = getattr(self, name).realised
        return values
