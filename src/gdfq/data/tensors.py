"""Given data of networks that take more than images: tensors by the names of the inputs."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.data.datasets import ImageData, as_labels, check_labels, readable_images
from gdfq.data.preprocessing import Preprocessing
from gdfq.errors import UsageError
from gdfq.files.untrusted import read_npz

LABELS = "labels"
"""The name of labels among tensors by name."""


@dataclass(frozen=True, eq=False)
class TensorData:
    """Inputs as the network takes them, in the order of its inputs.

    Attributes:
        tensors: [N, *shape] for each input of the network.
        labels: Integers [N], or None.
    """

    tensors: tuple[Tensor, ...]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tensors[0])

    def inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of the given indices."""
        return tuple(tensor[chosen] for tensor in self.tensors)


Data = ImageData | TensorData


def network_inputs(data: Data, chosen: Tensor, preprocessing: Preprocessing) -> tuple[Tensor, ...]:
    """Return data of the given indices as the network takes it: a tensor for each input."""
    if isinstance(data, TensorData):
        return data.inputs(chosen)
    return (preprocessing(data.images(chosen)),)


def summary_of(data: Data, *, complete: bool = True) -> str:
    """How many entries, and a hash of the labels and of a few entries spread over all.

    Args:
        data: The entries.
        complete: Whether each image must be readable; if not, zeros stand for damaged ones.
    """
    digest = hashlib.sha256()
    chosen = torch.arange(0, len(data), -(-len(data) // 16))
    if isinstance(data, TensorData):
        few = data.inputs(chosen)
    else:
        few = (data.images(chosen) if complete else readable_images(data, chosen)[0],)
    for tensor in (*few, data.labels):
        if tensor is not None:
            # Viewed as bytes, because NumPy has no bfloat16; only a copy is dense for every tensor.
            dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(dense.view(torch.uint8).numpy().data)
    return f"{len(data)} images, {digest.hexdigest()[:16]}"


def to_npz(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the contents of an .npz file of tensors by name, which `load_tensors` reads."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def load_tensors(
    data: object,
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    classes: int | None,
) -> TensorData:
    """Read data of a network with several inputs, or with integers.

    Args:
        data: A mapping of the inputs' names to tensors [N, *shape], with `labels` [N] if there are
            any; a pair of such a mapping and labels; or an .npz file of such arrays.
        inputs: Shape of one entry and dtype of each input, by name, in order.
        classes: Of the network, if it has any.

    Raises:
        UsageError: An input is missing or has another shape or type, or labels are out of range.
    """
    given = _mapping(data)
    unknown = [name for name in given if name not in inputs and name != LABELS]
    missing = [name for name in inputs if name not in given]
    if unknown or missing:
        raise UsageError(
            f"data must have a tensor for each input of the network, {', '.join(inputs)}; "
            f"got {', '.join(map(str, given)) or 'none'}."
        )
    tensors = tuple(_checked(name, given[name], *inputs[name]) for name in inputs)
    labels = None if LABELS in inputs or LABELS not in given else given[LABELS]
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) > 1 or lengths == {0}:
        raise UsageError(
            "data must have the same number of entries for each input, and at least one; got "
            f"{', '.join(str(len(tensor)) for tensor in tensors)}."
        )
    loaded = TensorData(tensors, None if labels is None else as_labels(labels, classes))
    check_labels(loaded.labels, len(loaded), classes)
    return loaded


def _mapping(data: object) -> dict[str, Any]:
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Mapping):
        return {**data[0], LABELS: data[1]}
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, str | Path):
        try:
            return {n: torch.from_numpy(array) for n, array in read_npz(Path(data)).items()}
        except Exception as error:  # zipfile and zlib raise types of their own
            raise UsageError(
                "data of a network with several inputs must be a readable .npz file of arrays by "
                f"the inputs' names; {data} is none: {error}."
            ) from error
    raise UsageError(
        "data of a network with several inputs, or with integers, must be a mapping of the inputs' "
        f"names to tensors [N, ...], or an .npz file of such arrays; got a {type(data).__name__}."
    )


def _checked(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"data must be tensors; {name!r} is a {type(value).__name__}.") from error
    if tensor.is_floating_point() and dtype.is_floating_point:
        tensor = tensor.to(dtype)
    fits = tensor.dtype == dtype or (
        not tensor.is_floating_point() and not dtype.is_floating_point and dtype != torch.bool
    )
    if tuple(tensor.shape[1:]) != shape or not tensor.ndim or not fits:
        raise UsageError(
            f"input {name!r} must be {dtype} of shape {['N', *shape]}; "
            f"got {tensor.dtype} of {list(tensor.shape)}."
        )
    return tensor.detach().cpu().to(dtype)
