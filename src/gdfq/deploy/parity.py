"""Parity of a runtime with the student: outputs, and activations code by code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.functional.float_grid import FORMATS, fake_quantize_float, neighbours
from gdfq.functional.grid import token_scales
from gdfq.functional.integer import rounded
from gdfq.graph import operators
from gdfq.graph.outputs import in_order
from gdfq.student.integer_form import SCALE
from gdfq.student.integer_network import IntegerNetwork, scale_of

TOLERANCE, TOLERANCE_OVERALL = 0.05, 0.25
"""Relative errors of the outputs that always pass: the median of images, and overall.

Another order of summation rounds some activations differently, which moves some images' logits
by a few percent; a missing clamp moves those of all (measured: by 20 to 60 %). Networks
that are more sensitive are measured against themselves: see `is_equal`.
"""
_MAX_CODE_ERROR = 0.5 + 0.05
"""Distance in codes up to which a code is the nearest one to a number, apart from rounding.

Another order of summation, and products of scales, change it by less than 0.001.
"""
_MAX_ROUNDED_SHARE, _MAX_ROUNDED_CODES = 0.01, 4
"""Share and number of an activation's codes that may differ from the nearest code."""
FROM_EQUAL_CODES = 1e-3
"""Largest relative error of the outputs from equal codes, by float rounding (1e-7 is usual)."""
_MIN_NORM = 1e-12


@dataclass(frozen=True)
class Parity:
    """Errors of a runtime's outputs against the student's on some images.

    With several outputs, each error is that of the worst.
    """

    images: int
    max_difference: float
    """Largest absolute difference of an output element."""
    relative_error: float
    """‖z − y‖ / ‖y‖ over all numbers of an output y of the student and z of the runtime."""
    typical_error: float
    """The median over the images of the relative error."""
    agreement: float | None
    """Images with the same predicted class, in percent; None if outputs are not classes."""

    def within(self, typical: float, overall: float) -> bool:
        """Return whether both errors are within these limits; NaN is not."""
        return self.typical_error <= typical and self.relative_error <= overall

    @classmethod
    def of(cls, expected: Sequence[Tensor], actual: Sequence[Tensor], classes: bool) -> "Parity":
        """Compare outputs [N, ...] of the student and of the runtime."""
        differences, overall, typical = [], [], []
        for theirs, ours in zip(expected, actual, strict=True):
            theirs = theirs.double().reshape(len(theirs), -1)
            distance = ours.double().reshape(len(ours), -1) - theirs
            differences.append(float(distance.abs().max()))
            overall.append(float(distance.norm() / theirs.norm().clamp_min(_MIN_NORM)))
            by_image = distance.norm(dim=1) / theirs.norm(dim=1).clamp_min(_MIN_NORM)
            typical.append(float(by_image.median()))
        agreement = None
        if classes:
            agreement = 100 * float((actual[0].argmax(1) == expected[0].argmax(1)).double().mean())
        return cls(len(expected[0]), max(differences), max(overall), max(typical), agreement)

    def __str__(self) -> str:
        return (
            f"{self.typical_error:.2%} off for most inputs and {self.relative_error:.2%} overall, "
            f"{self.max_difference:.3g} at most, on {self.images} inputs"
        )


@torch.no_grad()
def is_equal(network: IntegerNetwork, inputs: Sequence[Tensor], parity: Parity) -> bool:
    """Return whether a runtime with this parity on some inputs is equal but for rounding.

    The effect of rounding is the distance of the student from itself where sums are rounded in
    floats (`IntegerNetwork.module`).

    Args:
        network: The student.
        inputs: A tensor [N, *shape] for each input of the network.
        parity: Parity of the runtime with the student on these inputs.
    """
    if parity.within(TOLERANCE, TOLERANCE_OVERALL):
        return True
    expected = network.outputs(*inputs)
    in_floats = in_order(network.module(*inputs))
    sensitivity = Parity.of(expected, in_floats, classes=False)
    return parity.within(
        max(TOLERANCE, 2 * sensitivity.typical_error),
        max(TOLERANCE_OVERALL, 2 * sensitivity.relative_error),
    )


@dataclass(frozen=True)
class CodesParity:
    """Differences of a runtime's codes of one activation from the student's, from equal inputs."""

    name: str
    differ: float
    """Share of the codes that differ from the student's."""
    wrong: float
    """Share of the codes that also are not the nearest to the unrounded number."""
    count: int
    """Number of codes."""

    @property
    def only_rounded(self) -> bool:
        """Return whether rounding can explain the differences."""
        return self.wrong <= _MAX_ROUNDED_SHARE or self.wrong * self.count <= _MAX_ROUNDED_CODES


class StoredNumbers(Protocol):
    """How a file stores the numbers of an activation."""

    @property
    def name(self) -> str:
        """Name of the codes in the file; of the numbers themselves on a floating-point grid."""
        ...


class Stored(StoredNumbers, Protocol):
    """How a file stores the codes of an activation."""

    @property
    def lowest(self) -> int:
        """What is stored for the lowest code."""
        ...


@torch.no_grad()
def compare_codes(
    network: IntegerNetwork,
    inputs: Sequence[Tensor],
    found: Mapping[str, np.ndarray[Any, Any]],
    stored: Mapping[str, StoredNumbers],
) -> tuple[list[CodesParity], list[Tensor]]:
    """Compare a runtime's codes with the student's, in its order.

    After each quantizer the student continues with the runtime's codes. So all activations are
    compared from equal inputs, and no difference is a consequence of another.

    Args:
        network: The student.
        inputs: A tensor [N, *shape] for each input of the network.
        found: The runtime's codes of each activation for these inputs, by the name in the file.
        stored: How the file stores the codes of each activation, by the name of its grid.

    Returns:
        The parity of each activation in order, and the student's outputs from the runtime's codes.
    """
    walk = _OnGivenCodes(network, found, stored)
    outputs = in_order(walk.run(*inputs))
    return walk.parities, outputs


class _OnGivenCodes(fx.Interpreter):
    def __init__(
        self,
        network: IntegerNetwork,
        found: Mapping[str, np.ndarray[Any, Any]],
        stored: Mapping[str, StoredNumbers],
    ) -> None:
        super().__init__(network.integer_form)
        self.grids = {str(scale_of(grid.node).target): grid for grid in network.activations}
        self.stored = stored
        self.found = found
        self.tokens = iter(network.tokens)
        self.parities: list[CodesParity] = []

    def run_node(self, n: fx.Node) -> Any:
        if operators.name_of(n) == operators.FAKE_QUANTIZE_FLOAT:
            return self._on_float_grid(n)
        if operators.name_of(n) == operators.FAKE_QUANTIZE_TOKENS:
            return self._on_tokens(n)
        if SCALE not in n.meta:
            return super().run_node(n)
        (steps, *bounds), _ = self.fetch_args_kwargs_from_env(n)
        stored: Any = self.stored[self.grids[n.meta[SCALE]].name]
        numbers = torch.from_numpy(self.found[stored.name]).to(steps.dtype)
        lowest, _ = bounds
        # The file may flatten after the quantizer.
        actual = numbers.reshape(steps.shape) - stored.lowest + lowest
        self._compare(stored.name, actual, rounded(steps, *bounds), steps.clamp(*bounds))
        return actual

    def _compare(self, name: str, actual: Tensor, nearest: Tensor, steps: Tensor) -> None:
        """Keep the parity of codes with the nearest ones to numbers, in units of a scale."""
        differ = actual != nearest
        wrong = differ & ~((actual - steps).abs() <= _MAX_CODE_ERROR)
        shares = [float(mask.double().mean()) for mask in (differ, wrong)]
        self.parities.append(CodesParity(name, shares[0], shares[1], actual.numel()))

    def _on_tokens(self, n: fx.Node) -> Tensor:
        """Compare codes with a scale for each token, which both find, and continue with them.

        Roundings stand in the same order in both forms of a network.
        """
        (x, bits), _ = self.fetch_args_kwargs_from_env(n)
        scale, name = token_scales(x, bits), self.stored[next(self.tokens).name].name
        actual, steps = torch.from_numpy(self.found[name]).reshape(x.shape), x / scale
        self._compare(name, actual, steps.round(), steps)
        return actual * scale

    def _on_float_grid(self, n: fx.Node) -> Tensor:
        """Compare the numbers of an activation on a floating-point grid, and continue with them."""
        (x, scale, name), _ = self.fetch_args_kwargs_from_env(n)
        form = FORMATS[name]
        stored = self.stored[self.grids[str(scale_of(n).target)].name]
        actual = torch.from_numpy(self.found[stored.name]).reshape(x.shape)
        steps = (x / scale).clamp(form.lowest, form.largest)
        below, above = neighbours(steps, form)
        differ = actual != fake_quantize_float(x, scale, name)
        wrong = differ & ~((actual / scale - steps).abs() <= _MAX_CODE_ERROR * (above - below))
        shares = [float(mask.double().mean()) for mask in (differ, wrong)]
        self.parities.append(CodesParity(stored.name, shares[0], shares[1], actual.numel()))
        return actual
