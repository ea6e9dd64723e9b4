"""Prompts in: sources of questions, chat rendering, and the mixture that training draws from."""
