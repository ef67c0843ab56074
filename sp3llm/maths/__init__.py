"""Tensor mathematics: no Hugging Face, no options, nothing of ours."""
