"""bfloat16 in layers."""

from dataclasses import replace

import pytest
import torch
from support.group_figures import difference
from support.narrowing import instance, present
from torch import nn

from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.quantizers.family import LSQ
from gdfq.recipes import FAST
from gdfq.sources.generator import GeneratorSource
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.distill import Distillation, tune_


def test_bfloat16_is_used_in_layers_only(teacher: Captured) -> None:
    """Statistics and losses are in float32, and differ from those of float32 by bfloat16's rounding."""
    found = {}
    for precision in ("float32", "bfloat16"):
        source = GeneratorSource(batch=16)
        context = Context(seed=1, precision=precision)
        (batch,) = source.stream(teacher, steps=1, context=context)
        student = build_student(teacher, Scheme(Bits(4, 4), "full"), quantizers=LSQ)
        calibrate_(student, [batch], steps=1)
        ranges = [instance(m.log_scale, nn.Parameter) for m in student.activations]
        config = replace(instance(FAST.tuning, Distillation), cross_entropy=0.5)
        steps: list[Step] = []
        tune_(student, teacher, [batch], config, first_step=0, total_steps=1, context=replace(context, listener=steps.append))  # fmt: skip
        losses = {**batch.losses, **steps[0].losses}
        tensors = [*losses.values(), batch.teacher_logits, *student.state_dict().values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        found[precision] = losses, torch.stack([present(scale.grad) for scale in ranges])
    (full, full_grads), (low, low_grads) = found["float32"], found["bfloat16"]
    assert (
        full.keys()
        == low.keys()
        == {"generator", "bns", "boundary", "student", "ce", "kd", "features"}
    )
    for name, value in full.items():
        assert float(low[name]) == pytest.approx(float(value), rel=0.1), name
    assert any(low[name] != full[name] for name in full)
    assert difference(full_grads, low_grads) < 0.1
