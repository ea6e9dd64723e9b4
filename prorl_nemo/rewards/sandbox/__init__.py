"""Running programs that a model wrote: a box per submission, a forked run per test."""

from __future__ import annotations

from prorl_nemo.errors import UserError

# The pool's choice of a sandbox reaches worker processes by this variable.
SANDBOX_VARIABLE = "PRORL_SANDBOX"


class SandboxError(UserError):
    """The sandbox itself does not work here; no submission is at fault."""
