"""What a run sees on its way and forgets otherwise: evidence for its report is gathered from it."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from gdfq.analysis.accuracy import Answers, logits_of
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import Data
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.progress import Listener
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import image_shape
from gdfq.student.integer_network import IntegerNetwork


@dataclass(frozen=True, eq=False)
class Tested:
    """Test images with their labels [N], and what teacher and student answered to them."""

    data: Data
    labels: Tensor
    teacher: Answers
    student: Answers

    @classmethod
    def of(
        cls,
        teacher: Captured,
        network: IntegerNetwork,
        held_out: Data,
        preprocessing: Preprocessing,
        listener: Listener,
        memory: MemoryBudget = MemoryBudget(),
    ) -> "Tested":
        """What teacher and student, both classifiers, answer to labelled test images."""
        ask = partial(logits_of, device=teacher.device, listener=listener, memory=memory)
        answers = (
            Answers.of(ask(module, held_out, preprocessing))
            for module in (teacher.network, network)
        )
        assert held_out.labels is not None
        return cls(held_out, held_out.labels, *answers)


@dataclass(frozen=True, eq=False)
class Witness:
    """Inputs that the student saw last, [N, *shape] each, their labels [N], and test results.

    teacher: with the scales of the student's channels (`gdfq.student.equalization`). labels are
    None for a network without classes, `tested` where there was nothing to test on.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    teacher: Captured
    tested: Tested | None

    @property
    def images(self) -> Tensor:
        """The images [N, *input_shape] of a network that takes images alone.

        Raises:
            UsageError: It takes something else.
        """
        image_shape(self.teacher.inputs)
        return self.inputs[0]
