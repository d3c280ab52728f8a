"""A model and its settings: recordings in, segments out."""
