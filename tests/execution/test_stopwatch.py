"""Seconds of stages in a run that was stopped and resumed."""

import time

import pytest

from gdfq.execution.stopwatch import Countdown, Stopwatch


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


def test_countdown_counts_time_before_a_stop_but_not_that_between_runs() -> None:
    now = [100.0]
    first = Countdown(60.0, started=90.0, clock=lambda: now[0])
    now[0] += 5
    assert (first.used(), first.left()) == (15, 45)
    first.exclude(4)
    assert first.left() == 49
    state = first.state_dict()
    now[0] += 1000  # stopped
    second = Countdown(60.0, clock=lambda: now[0])
    now[0] += 2
    second.load_state_dict(state)
    now[0] += 50
    assert second.left() == pytest.approx(60 - 11 - 2 - 50)
