"""Errors a user can act on. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake in the input: the message names the key or path, and the fix.

    Attributes:
        status: exit status of the command.
    """

    status = 2


class RecipeError(UserError):
    """The recipe cannot be honoured."""


class FaultError(UserError):
    """Processes or nodes failed more often than may be; the same command may work elsewhere."""

    status = 4


class ModelError(UserError):
    """The model cannot be found, read or mapped."""
