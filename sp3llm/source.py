"""An old address: what was here is in `sp3llm.models.source`. For scripts written before that."""

from sp3llm.models.source import _HUB_PATTERNS, _NOT_FETCHED, bundled_model, resolve_model

__all__ = ["_HUB_PATTERNS", "_NOT_FETCHED", "bundled_model", "resolve_model"]
