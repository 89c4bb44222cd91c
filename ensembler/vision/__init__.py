"""The same rules over class logits: ensembles of image classifiers."""
