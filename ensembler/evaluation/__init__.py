"""Evaluation of ensembles: log-probs of given texts, tasks of lm-eval over grids of α, and benchmarks of methods."""
