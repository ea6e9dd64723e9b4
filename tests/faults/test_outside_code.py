"""Code that is not ours in a real run: tracking back ends that are down, and a reset trigger of
the user's own.

The back ends are stand-ins for the clients of wandb and mlflow that do what theirs do without a
server: one never answers, the other raises after a while.
"""

from __future__ import annotations

import time
from pathlib import Path

from real_run import RealRun, events_of, rows_of

STEPS = 6
WANDB = "import threading\n\n\ndef init(**settings):\n    threading.Event().wait()\n"
MLFLOW = "import time\n\ntime.sleep(1)\nraise ConnectionError('no route to host')\n"
TRIGGER = '''
class LongEnough:
    """Fires while responses are shorter than their limit, from the third step on."""

    name = "long_enough"

    def fires(self, figures, metrics):
        room = metrics["rollout/response_limit"] - metrics["rollout/response_tokens_mean"]
        return figures["step"] >= 3 and room > 0
'''


def test_back_ends_that_are_down_and_a_trigger_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "mlflow.py").write_text(MLFLOW)
    (tmp_path / "my_triggers.py").write_text(TRIGGER)
    rules = "interval: null, kl_factor: null, stalled_evaluations: null, cooldown: 1"
    settings = [
        f"stages=[{{steps: {STEPS}}}]",
        f"reference_reset={{{rules}, triggers: ['my_triggers:LongEnough']}}",
        "validation.at_start=false",
        "validation.interval=1000",
        "tracking.backends=[wandb, mlflow]",
        f"runs_dir={tmp_path / 'runs'}",
    ]
    with RealRun(settings, tmp_path / "log", {"PYTHONPATH": str(tmp_path)}) as run:
        run.wait_for_step(STEPS, 200)
        trained = time.monotonic()
        assert run.finish() == 0, run.output()
    # The one that never answers is given 20 seconds at the end, and no more.
    assert time.monotonic() - trained < 100
    assert [row["step"] for row in rows_of(run.folder)] == list(range(1, STEPS + 1))
    lost = {event["of"]: event["rows"] for event in events_of(run.folder, "rows_lost")}
    # A row for each step and for the validation after the last.
    assert lost == {"wandb": STEPS + 1, "mlflow": STEPS + 1}
    resets = events_of(run.folder, "reference_reset")
    # The cool-down of one step holds the trigger back in every other step.
    assert [(e["trigger"], e["step"]) for e in resets] == [("long_enough", 3), ("long_enough", 5)]
