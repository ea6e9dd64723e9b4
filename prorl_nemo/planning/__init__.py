"""What a recipe needs on N GPUs of a kind: memory by part, time by phase, layouts that fit."""
