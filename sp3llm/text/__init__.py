"""Text: named sets, files, token windows."""
