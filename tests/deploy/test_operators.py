"""Kinds of operators in files of every target: equal in its runtime, or refused before the run.

Networks of several kinds side by side are quantized and exported, because a file takes about as
long for one kind as for several. If one fails, its kinds are tried one by one.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support import networks
from support.operator_table import KINDS, SHAPE
from support.surrounded import surrounded_each

from gdfq import TARGETS, GdfqError, QuantizedNetwork, UsageError
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.card import Card
from gdfq.deploy.executorch import runtime
from gdfq.deploy.line_process import LineProcess
from gdfq.deploy.onnx import exporter, writer
from gdfq.deploy.target import Target
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_

pytestmark = [
    pytest.mark.check,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
_TOGETHER = 13
GROUPS = [[*KINDS][first : first + _TOGETHER] for first in range(0, len(KINDS), _TOGETHER)]
_TRANSPOSED_IN_GROUPS = {
    "transposed_grouped": "transposed convolution in groups",
    "transposed_depthwise": "transposed convolution in groups",
}
REFUSED: dict[str, dict[str, str]] = {
    "onnx": {},
    "onnx-compat": {},
    "openvino": {
        "transposed_stride_beyond_kernel": "conv_transpose2d",
        "avg_pool_beyond": "avg_pool2d",
        "wrapped": "pad",
        "antialiased": "_upsample_bilinear2d_aa",
        "variance": "var",
    },
    "litert": {
        "volume": "a layer or pooling of 3 dimensions",
        "max_pool_dilated": "maximum pooling with dilation",
        "bicubic": "upsample_bicubic2d",
        "local_response_norm": "avg_pool3d",
        "glu": "glu",
        "selu": "selu",
        "celu": "celu",
        "antialiased": "_upsample_bilinear2d_aa",
        "error_function": "erf",
        "masked": "where",
        "variance": "var",
        "einsum": "einsum",
        "unfolded": "im2col",
    },
    "tensorrt": _TRANSPOSED_IN_GROUPS,
    "qnn": _TRANSPOSED_IN_GROUPS,
    "executorch": {
        "adaptive_max": "adaptive_max_pool2d",
        "softplus": "softplus",
        "mish": "mish",
        "pixel_unshuffle": "pixel_unshuffle",
        "volume": "conv3d",
        "bicubic": "upsample_bicubic2d",
        "wrapped": "pad",
        "local_response_norm": "pow",
        "log_softmax": "log_softmax",
        "glu": "glu",
        "selu": "selu",
        "celu": "celu",
        "root_mean_square": "rms_norm",
        "antialiased": "_upsample_bilinear2d_aa",
        "error_function": "erf",
        "exponential": "exp",
        "power": "pow",
        "absolute": "abs",
        "negative": "neg",
        "reversed_difference": "rsub",
        "minimum": "minimum",
        "masked": "where",
        "repeated": "repeat",
        "summed": "sum",
        "largest_of_channels": "max",
        "variance": "var",
        "einsum": "einsum",
        "unfolded": "im2col",
    },
}
"""Kinds that a target refuses, each with a part of its reason. It takes all others."""
PLANS = [
    *(
        ("w7a8", ("onnx", "onnx-compat", "openvino", "litert"), group)
        for group in range(len(GROUPS))
    ),
    *(("w3a5", ("onnx", "openvino", "litert"), group) for group in (0, 2, 4)),
    *(("w8a8", ("tensorrt",), group) for group in range(0, len(GROUPS), 2)),
    *(("w4a8", ("qnn",), group) for group in range(1, len(GROUPS), 2)),
]
"""Bits, targets whose students are the same, and groups of kinds: for devices every second one.

On processors without VNNI kernels saturate with weights of 8 bits, not of 7."""
TRIED_IN_EXECUTORCH = (0, 1, 2, 3, 4)
"""Groups of kinds that are lowered for ExecuTorch, which takes minutes."""


@functools.cache
def teacher_of(*kinds: str) -> Captured:
    return surrounded_each({kind: KINDS[kind]() for kind in kinds}, SHAPE)


def scheme_for(target: Target, bits: str) -> Scheme:
    return Scheme(Bits.parse(bits), "full", grids=target.grids)


@functools.lru_cache(maxsize=1)  # targets with equal grids have equal students
def student_of(kinds: tuple[str, ...], scheme: Scheme) -> QuantizedNetwork:
    """A calibrated student of kinds side by side, as a run makes it."""
    teacher, images = teacher_of(*kinds), networks.images(16, shape=SHAPE)
    student = build_student(teacher, scheme)
    calibrate_(student, [Batch((images,), None, None)], steps=1)
    card = Card(
        teacher.inputs, teacher.classes, teacher.outputs, Preprocessing.of(SHAPE[0], None, None),
        scheme.bits, scheme.placement, "fast", 0,
    )  # fmt: skip
    return QuantizedNetwork(freeze(student), card, examples=images[:8])


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch traces a student once for several targets, which is most of an export's time."""
    exported = exporter.exported
    known: dict[str, Any] = {}

    def once(network: Any, inputs: Any) -> Any:
        key = str(network.graph)
        if key not in known:
            known[key] = exported(network, inputs)
        return known[key].clone()

    monkeypatch.setattr(writer, "exported", once)


def taken(target: Target, group: int) -> list[str]:
    return [kind for kind in GROUPS[group] if kind not in REFUSED[target.name]]


def faults(kinds: Sequence[str], target: Target, bits: str, path: Path) -> Iterator[str]:
    """Yield the kinds, each with its error, whose files are not equal."""
    try:
        export(kinds, target, bits, path)
    except GdfqError as error:
        if len(kinds) == 1:
            yield f"{target.name} {kinds[0]}: {error}"
            return
        alone = [fault for kind in kinds for fault in faults([kind], target, bits, path)]
        yield from alone or [f"{target.name} {', '.join(kinds)} together: {error}"]


def export(kinds: Sequence[str], target: Target, bits: str, path: Path) -> None:
    """Write a file as a run does, which its runtime then compares with the student."""
    scheme = scheme_for(target, bits)
    target.check_scheme(teacher_of(*kinds), scheme)
    student_of(tuple(kinds), scheme).export(path, target=target)


@pytest.fixture(scope="module")
def executorch_process(executorch: None) -> Iterator[LineProcess]:
    """One process for all files, because it takes seconds to start."""
    with runtime._process("write and run the files") as process:
        yield process


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("bits", "targets", "group"), PLANS)
def test_file_of_each_kind_is_equal_unless_it_is_refused_before_the_run(
    bits: str, targets: tuple[str, ...], group: int, tmp_path: Path
) -> None:
    found: list[str] = []
    absent: list[str] = []
    for target in map(TARGETS.__getitem__, targets):
        if target.runtime is not None and target.runtime.is_installed:
            found += faults(taken(target, group), target, bits, tmp_path / target.file_name)
        else:
            absent.append(target.name)
    assert found == []
    if absent:
        pytest.skip(f"the runtime of {', '.join(absent)} is not installed; the others are equal")


@pytest.mark.parametrize(("bits", "group"), [("w8a8", group) for group in TRIED_IN_EXECUTORCH])
def test_file_of_each_kind_is_equal_in_executorch(
    bits: str,
    group: int,
    executorch_process: LineProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "_process", lambda _: nullcontext(executorch_process))
    target = TARGETS["executorch"]
    assert [*faults(taken(target, group), target, bits, tmp_path / target.file_name)] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_before_the_run_names_layer_and_reason(name: str) -> None:
    target = TARGETS[name]
    for kind, reason in REFUSED[name].items():
        with pytest.raises(UsageError, match=rf"there is none for: .*\S+ \({reason}"):
            target.check_scheme(teacher_of(kind), scheme_for(target, "w8a8"))
