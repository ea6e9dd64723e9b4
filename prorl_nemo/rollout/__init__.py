"""Responses out: vLLM engines, the fleet that keeps them alive, the dynamic sampler."""
