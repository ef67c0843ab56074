"""What a model is for: everything about it that is not in its layers, an objective a file."""
