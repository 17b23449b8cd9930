"""Small students and inputs that tests of several packages share."""

import torch
from support import networks
from torch import Tensor, nn

from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.quantizers.family import LSQ, QuantizerFamily
from gdfq.sources.base import Batch
from gdfq.student.build import Student, build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_


def noise() -> Tensor:
    """White images [64, *SHAPE], the same in each call."""
    return torch.randn(64, *networks.SHAPE, generator=torch.Generator().manual_seed(1))


def student_of(
    teacher: Captured, images: Tensor, bits: str = "w3a3", quantizers: QuantizerFamily = LSQ
) -> Student:
    """A student in placement `relu`, calibrated on the images in one step."""
    student = build_student(teacher, Scheme(Bits.parse(bits), "relu"), quantizers=quantizers)
    calibrate_(student, [Batch((images,), None, None)], steps=1)
    return student


def transformer() -> nn.Module:
    """The small transformer with the same random weights in each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return networks.Transformer().eval()
