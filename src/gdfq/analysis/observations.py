"""What a run observes and does not save: the report's evidence is measured from it."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from gdfq.analysis.accuracy import Predictions, logits_of
from gdfq.analysis.samples import SampleComparison
from gdfq.data.preprocessing import Preprocessing
from gdfq.data.tensors import Data
from gdfq.data.tokens import Decode
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.progress import Listener
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import image_shape
from gdfq.sources.candidates import Candidates, Screening
from gdfq.student.integer_network import IntegerNetwork


@dataclass(frozen=True, eq=False)
class TestPredictions:
    """Predictions of teacher and student for labelled test images.

    Attributes:
        data: The test images.
        labels: Their labels [N].
        teacher: The teacher's predictions.
        student: The integer network's predictions.
    """

    __test__ = False  # not a test case, in spite of its name

    data: Data
    labels: Tensor
    teacher: Predictions
    student: Predictions

    @classmethod
    def of(
        cls,
        teacher: Captured,
        network: IntegerNetwork,
        test: Data,
        preprocessing: Preprocessing,
        listener: Listener,
        memory: MemoryBudget = MemoryBudget(),
    ) -> "TestPredictions":
        """Classify labelled test images with teacher and integer network, both classifiers."""
        logits = partial(logits_of, device=teacher.device, listener=listener, memory=memory)
        predictions = (
            Predictions.of(logits(module, test, preprocessing))
            for module in (teacher.network, network)
        )
        assert test.labels is not None
        return cls(test, test.labels, *predictions)


@dataclass(frozen=True, eq=False)
class Observations:
    """What the report needs besides the network.

    Attributes:
        inputs: The last inputs that the student was tuned on, [N, *shape] each.
        labels: Their labels [N]; None for a network without classes.
        teacher: The teacher with the channel scales of the student
            (`gdfq.student.equalization`).
        tested: Predictions for the test images; None without test images or without classes.
        candidates: Images from elsewhere, if there were any.
        screening: What the screen found of them.
        decode: The text of token ids, of a language model with a tokenizer.
        denoiser: Whether it is the denoiser of a diffusion model.
        samples: Images that a denoiser and its student generated, if any were asked for.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    teacher: Captured
    tested: TestPredictions | None
    candidates: Candidates | None = None
    screening: Screening | None = None
    decode: Decode | None = None
    denoiser: bool = False
    samples: SampleComparison | None = None

    @property
    def images(self) -> Tensor:
        """The images [N, *input_shape] of a network that takes images alone.

        Raises:
            UsageError: It takes something else.
        """
        image_shape(self.teacher.inputs)
        return self.inputs[0]
