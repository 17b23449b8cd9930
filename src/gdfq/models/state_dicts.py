"""State dicts inside a checkpoint, and how they fit a network."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 4
"""Maximum depth of a state dict inside a checkpoint."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
"""Parts of names that wrappers put anywhere into them."""
_COUNTERS = ("num_batches_tracked",)
"""Buffers that change nothing, so that they may be missing."""
_EXTRAS = ("n_averaged", "num_batches_tracked", "total_ops", "total_params")
"""Buffers that wrappers, batch norms and profilers add, and that change nothing."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged|moving_average)($|[._])", re.IGNORECASE)
_MAX_LISTED = 5


@dataclass(frozen=True, eq=False)
class StateDict:
    """Tensors by name, and the key in the checkpoint under which they lie ("" for its top)."""

    key: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fit:
    """How a state dict fits a network when a prefix is taken off its names.

    Attributes:
        key: The key of the state dict in the checkpoint.
        prefix: What is taken off the names.
        tensors: The tensors for the network, by its names.
        problems: Why it does not fit, by kind; empty if it does.
        distance: How many tensors do not fit.
        advice: What to do about it.
    """

    key: str
    prefix: str
    tensors: Mapping[str, Tensor]
    problems: tuple[str, ...]
    distance: int
    advice: str

    @property
    def is_averaged(self) -> bool:
        """Whether the names say that these weights are averages over training."""
        return bool(_AVERAGED.search(f"{self.key}.{self.prefix}"))

    @property
    def place(self) -> str:
        """Where in the file the tensors are, for messages."""
        key = f", {self.key!r}" if self.key else ""
        return key + (f" behind the prefix {self.prefix!r}" if self.prefix else "")

    def equals(self, other: "Fit") -> bool:
        """Whether both hold the same numbers."""
        return self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items()
        )


def state_dicts(content: object, key: str = "", levels: int = _LEVELS) -> Iterator[StateDict]:
    """Yield each mapping with tensors under text keys, from the top down."""
    if not isinstance(content, dict):
        return
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(isinstance(name, str) for name in tensors):
        yield StateDict(key, tensors)
    if levels:
        for name, value in content.items():
            if isinstance(name, str):
                yield from state_dicts(value, f"{key}.{name}" if key else name, levels - 1)


def fitted(state: StateDict, wanted: Mapping[str, Tensor]) -> list[Fit]:
    """Return how a state dict fits a network, with each prefix under which some names do.

    The names as they are come first, and alone if they fit.
    """
    plain = _fit(state, "", wanted)
    if not plain.problems:
        return [plain]
    names = {name: _without_wrappers(name, wanted) for name in state.tensors}
    prefixes = dict.fromkeys(
        name[: dot.end()]
        for name in (*names, *names.values())
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in wanted
    )
    cleaned = StateDict(state.key, {names[name]: value for name, value in state.tensors.items()})
    # Taking wrappers off may make two names one; then only the names as they are count.
    sources = [state] if len(cleaned.tensors) < len(state.tensors) else [state, cleaned]
    fits = [_fit(source, prefix, wanted) for source in sources for prefix in ("", *prefixes)]
    good = [fit for fit in fits if not fit.problems]
    if good:
        return list({id(next(iter(fit.tensors.values()))): fit for fit in reversed(good)}.values())
    return [min((plain, *fits), key=lambda fit: fit.distance)]


def _without_wrappers(name: str, wanted: Mapping[str, Tensor]) -> str:
    for part in _WRAPPERS:
        if not any(part in expected for expected in wanted):
            name = name.replace(part, "") if name.startswith(part) or f".{part}" in name else name
    return name


def _fit(state: StateDict, prefix: str, wanted: Mapping[str, Tensor]) -> Fit:
    given = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(prefix)
    }
    missing = [n for n in wanted if n not in given and not _ends_with(n, _COUNTERS)]
    unexpected = [n for n in given if n not in wanted and not _ends_with(n, _EXTRAS)]
    there = [n for n in wanted if n in given]
    special = [n for n in there if not is_plain(given[n])]
    other_shape = [n for n in there if given[n].shape != wanted[n].shape]
    shapes = [f"{n} {list(given[n].shape)} for {list(wanted[n].shape)}" for n in other_shape]
    types = [
        f"{n} {given[n].dtype} for {wanted[n].dtype}"
        for n in there
        if not torch.can_cast(given[n].dtype, wanted[n].dtype)
    ]
    kinds = (
        ("missing", missing),
        ("surplus", unexpected),
        ("of another shape", shapes),
        ("of another type", types),
        ("no ordinary tensors", special),
    )
    return Fit(
        state.key,
        prefix,
        {n: given[n] for n in there},
        tuple(f"{what}: {few(names)}" for what, names in kinds if names),
        sum(len(names) for _, names in kinds),
        _advice(given, wanted, other_shape, bool(missing or unexpected)),
    )


def _advice(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    other_shape: Sequence[str],
    other_names: bool,
) -> str:
    """What to do about weights that do not fit; a head for other classes is named."""
    heads = {
        (given[n].shape[0], wanted[n].shape[0])
        for n in other_shape
        if given[n].ndim and given[n].shape[1:] == wanted[n].shape[1:]
    }
    if len(heads) == 1 and len(other_shape) <= 2 and not other_names:
        ((theirs, ours),) = heads
        return (
            f"The file's last layer has {theirs} outputs, the network's {ours}: make the network "
            f"with {theirs} classes, in a factory of your own."
        )
    return "Check that MODEL and --weights belong together."


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    return name.rpartition(".")[2] in ends


def is_plain(value: object) -> bool:
    """Return whether it is a dense tensor in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
