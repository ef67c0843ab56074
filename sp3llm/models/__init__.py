"""Families as tables, shapes and counts, checkpoints in and out, stock models run by layer."""
