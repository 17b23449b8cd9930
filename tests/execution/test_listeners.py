"""The history of a run that is stopped and resumed, and progress on a terminal."""

import io
import json
from pathlib import Path

import torch

from gdfq.execution.listeners import History, Terminal
from gdfq.execution.progress import Step
from gdfq.execution.stopwatch import Countdown
from gdfq.files.states import Frozen, from_bytes, to_bytes


def test_history_is_cut_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with History(path) as history:
        history(Step("tune", 1, 3, {"loss": torch.tensor(0.5)}))
        state = history.state_dict()
        whole = path.read_text()
        history(Step("tune", 2, 3, {"loss": torch.tensor(0.25)}))
    path.write_text(path.read_text() + '{"stage": "tu')  # killed while it wrote
    with History(path) as history:
        history.load_state_dict(state)
        assert path.read_text() == whole
        history(Step("tune", 2, 3, {"loss": torch.tensor(0.25)}))
    assert path.read_text() == whole + '{"stage": "tune", "step": 2, "loss": 0.25}\n'


def test_history_lists_a_repeated_batch_once(tmp_path: Path) -> None:
    """The run is stopped in the second batch of images, which begins with step 3."""
    path = tmp_path / "history.jsonl"

    def tell(history: History, steps: list[tuple[str, int]]) -> None:
        for stage, step in steps:
            history(Step(stage, step, 4, {"loss": torch.tensor(float(step))}))

    with History(path) as history:
        tell(history, [("images", 1), ("images", 2), ("images", 3)])
        state = from_bytes(to_bytes(history.state_dict(), str), Frozen)
        tell(history, [("images", 4)])
    with History(path) as history:
        history.load_state_dict(state)
        tell(history, [("images", 3), ("images", 4), ("tune", 1)])
    told = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [("images", 1), ("images", 2), ("images", 3), ("images", 4), ("tune", 1)]
    assert [(row["stage"], row["step"]) for row in told] == steps


def test_terminal_counts_down_to_the_budget() -> None:
    now, out = [0.0], io.StringIO()
    countdown = Countdown(150.0, clock=lambda: now[0])
    with Terminal(out, interval=0.0, countdown=countdown) as terminal:
        for index, at in ((1, 10.0), (2, 149.7), (3, 200.0)):
            now[0] = at
            terminal(Step("tune", index, 3, {}))
    lines = [line.split("  ")[-1] for line in out.getvalue().splitlines()]
    assert lines == ["2:20 of 2:30 left", "0:00 of 2:30 left", "0:00 of 2:30 left"]


def test_bar_counts_down_to_the_budget() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Screen()
    with Terminal(out, countdown=Countdown(150.0, clock=lambda: 0.0)) as terminal:
        terminal(Step("tune", 1, 1, {}))
    assert "2:30 of 2:30 left" in out.getvalue()
