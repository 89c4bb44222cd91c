"""Ensembles on vLLM: the engine is vLLM's, the members, rules and weights are ours."""
