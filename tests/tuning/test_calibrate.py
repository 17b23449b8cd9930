"""Calibration of a student."""

import pytest
import torch
from support import networks

from gdfq.errors import GdfqError
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_


def test_calibration_refuses_images_that_are_not_finite(teacher: Captured) -> None:
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    images = networks.images(4)
    images[0, 0, 0, 0] = torch.nan
    batch = Batch((images,), torch.zeros(4, dtype=torch.long), torch.zeros(4, networks.CLASSES))
    with pytest.raises(GdfqError, match="must be finite"):
        calibrate_(student, [batch], steps=1)
