"""Compress Hugging Face models into smaller ones of a stock architecture."""

__version__ = "0.1.0"

from sp3llm.api import compress, plan, recover
from sp3llm.errors import UserError

__all__ = ["UserError", "__version__", "compress", "plan", "recover"]
