"""Decoding with an ensemble: prompts in, texts out. The decode loops themselves are transformers'."""
