"""Signals stop a run."""

import os
import signal

import pytest

from gdfq.execution.signals import StoppedError, stoppable


def test_second_signal_stops_immediately() -> None:
    with stoppable() as check:
        check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError, match="SIGINT") as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.value.code == 130
        with pytest.raises(StoppedError, match="SIGTERM"):
            check()
