"""The last images of a stream."""

import pytest
import torch
from support import networks
from support.narrowing import present

from gdfq.files.states import Frozen
from gdfq.sources.base import Batch
from gdfq.sources.recent import Recent


def test_recent_holds_the_last_images(monkeypatch: pytest.MonkeyPatch) -> None:
    recent = Recent()
    assert recent.inputs() is None
    for step in range(9):
        batch = torch.full((100, *networks.SHAPE), float(step))
        recent.see_(Frozen(vars(Batch((batch,), torch.arange(100), None))))
    (seen,), labels = present(recent.inputs())
    assert len(seen) == len(present(labels)) == 256
    assert seen[0].unique().tolist() == [8]  # the newest first
    assert seen[:, 0, 0, 0].unique().tolist() == [6, 7, 8]
    monkeypatch.setattr("gdfq.sources.recent._MAX_ELEMENTS", 5 * 3 * 8 * 8)
    (few,), _ = present(recent.inputs())
    assert len(few) == 5  # fewer where images are large
