"""Weight space: carry a fine-tuning to another version of its model by addition (PortLLM, arXiv 2410.10870)."""
