"""Training a speech LLM: the corpus in memory, augmentation, losses, the stages of a curriculum."""
