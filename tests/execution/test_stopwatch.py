"""Seconds of stages in a run that was stopped and resumed."""

import time

import pytest

from gdfq.execution.stopwatch import Stopwatch


def test_stopwatch_counts_time_before_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    first = Stopwatch()
    now[0] += 3
    first.lap("images")
    now[0] += 2  # of a stage that is not over yet
    state = first.state_dict()
    now[0] += 1000  # stopped
    second = Stopwatch()
    second.load_state_dict(state)
    now[0] += 4
    second.lap("tune")
    assert second.seconds() == pytest.approx({"total": 9, "images": 3, "tune": 6})
