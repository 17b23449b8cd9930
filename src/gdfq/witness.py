"""What a run sees on its way and forgets otherwise: evidence for its report is gathered from it."""

from dataclasses import dataclass

from torch import Tensor

from gdfq.data import ImageData
from gdfq.evaluate import Answers


@dataclass(frozen=True, eq=False)
class Tested:
    """Test images with their labels [N], and what teacher and student answered to them."""

    data: ImageData
    labels: Tensor
    teacher: Answers
    student: Answers


@dataclass(frozen=True, eq=False)
class Witness:
    """Images that the student saw last [N, *input_shape], their labels [N], and test answers.

    labels are None for a network without classes, `tested` where there was nothing to test on.
    """

    images: Tensor
    labels: Tensor | None
    tested: Tested | None
