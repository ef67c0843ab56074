"""The record of a run, and everything that is shown of it."""
