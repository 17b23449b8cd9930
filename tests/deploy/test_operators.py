"""Kinds of operators in files of every target: equal in its runtime, or refused before the run.

Networks of several kinds side by side are quantized and exported, because a file takes about as
long for one kind as for several. If one fails, its kinds are tried one by one.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import networks
from support.operator_table import KINDS, SHAPE
from support.surrounded import surrounded_each
from torch import Tensor

from gdfq import TARGETS, GdfqError, QuantizedNetwork, UsageError
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.card import Card
from gdfq.deploy.executorch.runtime import executorch_runners
from gdfq.deploy.openvino.runtime import openvino_runner
from gdfq.deploy.runtimes import onnx_runner
from gdfq.deploy.target import Target
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_

RUNTIMES = {
    "onnx": onnx_runner,
    "onnx-compat": onnx_runner,
    "tensorrt": functools.partial(onnx_runner, as_written=True),
    "qnn": functools.partial(onnx_runner, as_written=True),
    "openvino": openvino_runner,
}


@functools.cache
def teacher_of(*kinds: str) -> Captured:
    return surrounded_each({kind: KINDS[kind]() for kind in kinds}, SHAPE)


def scheme_for(target: Target, bits: str) -> Scheme:
    return Scheme(Bits.parse(bits), "full", grids=target.grids)


def refusal(kind: str, target: Target, bits: str) -> str:
    """Why a target refuses a kind before the run; empty if it does not."""
    try:
        target.check_scheme(teacher_of(kind), scheme_for(target, bits))
    except UsageError as error:
        return str(error)
    return ""


def student_of(kinds: Sequence[str], target: Target, bits: str) -> QuantizedNetwork:
    """A calibrated student of kinds side by side, as a run for the target makes it."""
    teacher, images = teacher_of(*kinds), networks.images(16, shape=SHAPE)
    student = build_student(teacher, scheme_for(target, bits))
    calibrate_(student, [Batch((images,), None, None)], steps=1)
    card = Card(
        teacher.inputs, teacher.classes, teacher.outputs,
        Preprocessing((0.0,) * SHAPE[0], (1.0,) * SHAPE[0]), Bits.parse(bits), "full", "fast", 0,
    )  # fmt: skip
    return QuantizedNetwork(freeze(student), card, examples=(images[:8],))
