"""Long recordings: passes of the LLM, where their text is placed, and whether a transcript is complete."""
