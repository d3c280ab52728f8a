"""Our speech LLM in the conventions of transformers."""
