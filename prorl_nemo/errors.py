"""Errors a user can act on. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake in the input: the message names the key or path, and the fix."""


class RecipeError(UserError):
    """The recipe cannot be honoured."""


class ModelError(UserError):
    """The model cannot be found, read or mapped."""
