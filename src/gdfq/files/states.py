"""States as bytes: trees of tensors and plain values, in the safetensors format, without pickle."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gdfq.files.packing import packed, unpacked
from gdfq.files.untrusted import parse_json, safetensors_header

_KEY = "gdfq-state"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.uint64, torch.uint32, torch.uint16),
    )
}
"""Types of tensors that are packed."""


class Stateful(Protocol):
    """Anything that can be stopped and resumed: a module, an optimizer, a stream of batches.

    A state is a tree of dictionaries and lists whose leaves are tensors, numbers, strings, None
    and `Frozen`.
    """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(eq=False)
class Frozen:
    """A part of a state that will not change again, so that it needs to be written only once.

    Only an equal value, in other memory, may take the place of the value.
    """

    value: Any

    def to(self, device: torch.device) -> "Frozen":
        """Return a copy on a device. Parts read from a file are on the CPU."""
        return self if device.type == "cpu" else Frozen(_moved(self.value, device))


@dataclass(frozen=True)
class Entry:
    """A tensor that is stored elsewhere, in a frozen dictionary of tensors.

    Each tensor of a state has an entry of its own, also if it equals another one.

    Attributes:
        of: The dictionary.
        key: Its key there.
    """

    of: Frozen
    key: str


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(inside, device) for key, inside in value.items()}
    return [_moved(inside, device) for inside in value] if isinstance(value, list) else value


def all_finite(state: Any) -> bool:
    """Return whether all tensors of a state are finite. `Frozen` parts are not checked."""
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    if isinstance(state, Mapping):
        return all(map(all_finite, state.values()))
    return all(map(all_finite, state)) if isinstance(state, list | tuple) else True


class Results(dict[str, Any]):
    """A dictionary of results that a resumed run needs."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update(state)


def with_tensors(state: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a state with each of its tensors replaced. `Frozen` parts stay as they are.

    Args:
        state: A tree as `Stateful` describes it.
        change: Returns what takes the place of a tensor.
    """
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, Mapping):
        return {key: with_tensors(inside, change) for key, inside in state.items()}
    if isinstance(state, list | tuple):
        return [with_tensors(inside, change) for inside in state]
    return state


def digest_of(tensor: Tensor) -> str:
    """Return a hash of a tensor: its numbers, type, shape and strides."""
    dense = _dense(tensor)
    digest = hashlib.sha256(repr((dense.dtype, dense.shape, dense.stride())).encode())
    digest.update(_flat(dense).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _dense(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that is dense in memory, even if the tensor is a view."""
    return tensor.detach().cpu().clone()


def _flat(dense: Tensor) -> Tensor:
    """Return the numbers of a dense tensor in the order of memory, [n]."""
    return dense.as_strided((dense.numel(),), (1,))


def to_bytes(state: Any, name_of: Callable[[Frozen], str]) -> bytes:
    """Return a state as the contents of a safetensors file.

    Args:
        state: A tree as `Stateful` describes it, which may have an `Entry` for a tensor.
        name_of: Returns the name under which a frozen part is stored elsewhere.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def encoded(value: Any) -> Any:
        if isinstance(value, Tensor):
            dense = _dense(value)
            name, numbers = str(len(tensors)), _flat(dense)
            found = {"tensor": name, "shape": list(dense.shape), "stride": list(dense.stride())}
            kind = str(numbers.dtype).removeprefix("torch.")
            if kind in _DTYPES and (smaller := packed(numbers)) is not None:
                numbers, found["planes"] = smaller
                found["type"] = kind
            tensors[name] = numbers
            return found
        if isinstance(value, Frozen):
            return {"fixed": name_of(value)}
        if isinstance(value, Entry):
            return {"fixed": name_of(value.of), "entry": value.key}
        if isinstance(value, Mapping):  # in pairs: keys may be numbers
            return {"pairs": [[key, encoded(inside)] for key, inside in value.items()]}
        if isinstance(value, list | tuple):
            return [encoded(inside) for inside in value]
        return value

    text = json.dumps(encoded(state), separators=(",", ":"))
    return bytes(save(tensors, {_KEY: text}))


def from_bytes(data: bytes, fixed: Callable[[str], Frozen]) -> Any:
    """Read a state from the contents of a file; the inverse of `to_bytes`.

    Tensors keep their strides, because arithmetic in another memory order rounds differently.
    Tuples are returned as lists.

    Args:
        data: What `to_bytes` returned.
        fixed: Returns the frozen part of a name.

    Raises:
        ValueError: The contents are damaged. Contents of another structure raise other errors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # Copies, because the offsets of tensors in the file need not be aligned.
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error

    whole: dict[str, Tensor] = {}  # tensors that were packed

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(inside) for inside in value]
        if not isinstance(value, dict):
            return value
        if "entry" in value:
            return fixed(value["fixed"]).value[value["entry"]]
        if "fixed" in value:
            return fixed(value["fixed"])
        if "tensor" in value:
            name, count = value["tensor"], math.prod(value["shape"])
            if "planes" in value and name not in whole:
                dtype = _DTYPES[value["type"]]
                whole[name] = unpacked(tensors[name], value["planes"], count, dtype)
            tensor = whole.get(name, tensors[name])
            if count != tensor.numel():
                raise ValueError(f"{tensor.numel()} numbers cannot have shape {value['shape']}")
            return tensor.as_strided(value["shape"], value["stride"])
        return {key: decoded(inside) for key, inside in value["pairs"]}

    header = parse_json(safetensors_header(data))
    return decoded(parse_json(header["__metadata__"][_KEY]))


def name_of(data: bytes) -> str:
    """Return a name for contents: the first half of their SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def differences(state: Any, other: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two trees of plain values differ.

    Args:
        state: One tree.
        other: The other tree.
        where: Dotted path of both inside a larger tree.

    Returns:
        Dotted path of each such leaf -> its value in `state` and in `other`.
    """
    if not isinstance(state, dict) or not isinstance(other, dict):
        return {} if state == other else {where: (state, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**state, **other}:
        found |= differences(state.get(key), other.get(key), f"{where}.{key}".lstrip("."))
    return found
