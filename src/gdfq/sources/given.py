"""Given images as a source: for few-shot runs, and for the upper bound with real data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from gdfq.data.class_names import ClassNames
from gdfq.data.datasets import ArrayData, load_data, warn_of_unnormalised_floats
from gdfq.data.preprocessing import Preprocessing, Resize
from gdfq.data.tensors import Data, load_tensors, network_inputs
from gdfq.data.tokens import Encode, load_tokens
from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.graph.capture import Captured
from gdfq.graph.inputs import InputSpec, image_shape, takes_images, vocabulary_of
from gdfq.sources.base import Batch, Source, next_tokens
from gdfq.sources.stream import Shuffled, Stream


@tagged("GivenImages")
@dataclass(frozen=True)
class GivenImages(Source):
    """Stands in a recipe for images that the user must give.

    Attributes:
        batch: Images per batch.
    """

    batch: int

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> NoReturn:
        """Yield nothing.

        Raises:
            UsageError: Always; no images were given.
        """
        raise UsageError(
            "this recipe tunes on real images and none were given. "
            "Give them to gdfq quantize (--data, or data=...), or choose a data-free recipe, "
            "such as 'fast'."
        )


def load_given(
    data: Any,
    inputs: Sequence[InputSpec],
    classes: int | None,
    preprocessing: Preprocessing | None = None,
    names: ClassNames | None = None,
    encode: Encode | None = None,
) -> Data:
    """Read real inputs for a network.

    Args:
        data: For a network that takes images alone, what `gdfq.data.datasets.load_data` reads; for
            a language model, what `gdfq.data.tokens.load_tokens` reads: token ids or a text file;
            for any other, what `gdfq.data.tensors.load_tensors` does: a mapping of the inputs'
            names to tensors.
        inputs: Specifications of the network's inputs.
        classes: Number of classes, if the network is a classifier.
        preprocessing: Preprocessing of the network. It resizes the files of an image folder, and
            the range of given floats is compared with its output.
        names: Names of the classes, which identify class folders.
        encode: The tokenizer of a language model, which a text file needs.

    Raises:
        UsageError: The data cannot be used.
    """
    if (vocabulary := vocabulary_of(inputs)) is not None:
        return load_tokens(data, vocabulary, encode)
    if takes_images(inputs):
        resize = Resize() if preprocessing is None else preprocessing.resize
        images = load_data(data, image_shape(inputs), classes, resize, names)
        if preprocessing is not None and isinstance(images, ArrayData):
            warn_of_unnormalised_floats(images.array, preprocessing)
        return images
    return load_tensors(data, {spec.name: (spec.shape, spec.dtype) for spec in inputs}, classes)


def on_images(source: Source, data: Data, preprocessing: Preprocessing) -> Source:
    """Return a source of given images that replaces `source`.

    Args:
        source: The source of a recipe; its batch size is kept.
        data: The given images.
        preprocessing: From pixels to the input of the network.
    """
    return source.on(ImageSource(data, preprocessing, source.batch), len(data))


@dataclass(frozen=True, eq=False)
class ImageSource(Source):
    """Batches of given images in a new random order each epoch.

    Without labels the predictions of the teacher are the labels, if it has classes. The last,
    smaller batch of an epoch is kept.

    Attributes:
        data: The images.
        preprocessing: From pixels to the input space of the network.
        batch: Images per batch.
    """

    data: Data
    preprocessing: Preprocessing
    batch: int

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches."""
        draw = random_stream(context.seed, "images.order")
        order = Shuffled(draw, lambda indices: list(indices.split(self.batch)))

        def make(_: int) -> Batch:
            return read({"chosen": order.next_of(len(self.data))})

        def read(origin: Any) -> Batch:
            chosen = origin["chosen"]
            given = network_inputs(self.data, chosen, self.preprocessing)
            inputs = tuple(tensor.to(teacher.device) for tensor in given)
            with torch.no_grad():
                logits = teacher.logits(*inputs)
            labels = None if logits is None else logits.argmax(1)
            if teacher.vocabulary is not None:
                labels = next_tokens(inputs[0])
            if logits is not None and self.data.labels is not None:
                labels = self.data.labels[chosen].to(teacher.device)
            return Batch(inputs, labels, logits, origin=origin)

        return Stream(make, steps, [draw], {"order": order}, again=read)
