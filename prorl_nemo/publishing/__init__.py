"""An exported model for others: its card, the log of its training, and the upload."""
