"""Text as a tokenizer writes it: the bytes of its tokens, its merges, and the tokens that stay whatever follows."""
