"""The training loop, its state, and what it tells people while it runs."""
