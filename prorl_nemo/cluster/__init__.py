"""Processes and where they run: Ray actors round the trainer's ranks."""
