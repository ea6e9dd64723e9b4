"""A study: many runs of one recipe, with and without each part, and what they say together."""
