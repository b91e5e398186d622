"""Models of transformers that do not generate text, with a memory."""
