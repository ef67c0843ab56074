"""Compress Hugging Face decoder models into smaller ones of the same stock architecture."""

__version__ = "0.1.0"
