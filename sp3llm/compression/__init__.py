"""The compression itself: the story, the measuring pass, the building pass, learned masks."""
