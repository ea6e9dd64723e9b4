"""ProRL v2: prolonged reinforcement learning for language models, on Megatron-Core and vLLM."""

__version__ = "0.1.0"
