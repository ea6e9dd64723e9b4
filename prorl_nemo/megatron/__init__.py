"""The policy: the only room that imports Megatron-Core."""
