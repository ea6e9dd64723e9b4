"""What a checkpoint says beside its tensors, and how a run goes on from one.

Nothing of a run is anywhere else: a trainer that is built anew and given this state takes the same
steps as the one that was lost (docs/resume.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from prorl_nemo.errors import UserError
from prorl_nemo.training.metrics import EVENTS, read_rows

if TYPE_CHECKING:
    from prorl_nemo.training.loop import Trainer


class Stateful(Protocol):
    """A part of the run with a state that is JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that the rest of the run depends on beside the policy's tensors; JSON-able."""
    return {
        "step": trainer.step,
        "recipe": trainer.recipe.fingerprint,
        "updated_step": trainer.updated_step,
        "validated_step": trainer.validated_step,
        "last_validation": trainer.last_validation,
        "skipped_in_a_row": trainer.skipped.in_a_row,
        **{name: part.state_dict() for name, part in trainer.parts.items()},
        "log": trainer.log.flushed_sizes(),
    }


def _load_state(trainer: Trainer, state: dict[str, Any]) -> None:
    trainer.step, trainer.validated_step = state["step"], state["validated_step"]
    trainer.last_validation = state["last_validation"]
    trainer.updated_step = state.get("updated_step", trainer.step)  # Older checkpoints do not say.
    trainer.skipped.in_a_row = state["skipped_in_a_row"]
    for name, part in trainer.parts.items():
        part.load_state_dict(state[name])


def resume(trainer: Trainer) -> bool:
    """Go on from the newest whole checkpoint; engines get the weights. False without one.

    Rows and samples logged after that step are cut: those steps are done again.

    Raises:
        UserError: no checkpoint is whole, or it was written by another version.
    """
    checkpoints, log = trainer.checkpoints, trainer.log
    step, damaged = checkpoints.newest_whole()
    if step is None:
        return False
    state = checkpoints.read_state(step)
    try:
        _load_state(trainer, state)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoints.path(step)}: written by another version ({error!r}); resume with that "
            "version, or start a new run with name=NAME"
        ) from None
    trainer.session.policy.load(checkpoints.path(step) / "policy")
    shorter = log.shorter_than(state["log"])
    log.truncate_after(step)
    trainer.saver.recall(read_rows(trainer.recipe.run_dir / EVENTS))
    trainer.session.sync_weights(trainer.updated_step)
    for other, reason in damaged.items():
        trainer.event("checkpoint_damaged", damaged_step=other, reason=reason)
    if shorter:
        trainer.event("figures_missing", files=shorter)
    trainer.event("resumed", checkpoint=str(checkpoints.path(step)))
    return True
