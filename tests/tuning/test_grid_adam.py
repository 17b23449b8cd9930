"""Adam with a learning rate for each kind of parameter."""

import pytest

from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.optim import Cosine, set_rate_
from gdfq.quantizers.family import LSQ
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.grid_adam import GridAdam


def test_grid_adam_has_a_rate_for_each_kind_of_parameter(teacher: Captured) -> None:
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"), quantizers=LSQ)
    optimizer = GridAdam(code_lr=0.1, scale_lr=0.2, other_lr=0.3).build(student)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in student.named_parameters():
        kind = name.rpartition(".")[2]
        assert rates[id(parameter)] == {"codes": 0.1, "log_scale": 0.2}.get(kind, 0.3)
    assert len(rates) == len(list(student.parameters()))
    warm = Cosine(warmup=0.5)
    assert [warm.factor(step, 8) for step in (0, 1, 3, 4)] == pytest.approx(
        [share * Cosine().factor(step, 8) for step, share in ((0, 0.25), (1, 0.5), (3, 1), (4, 1))]
    )
    before = optimizer.param_groups[0]["lr"]
    set_rate_(optimizer, Cosine().factor(3, 4))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before * (0.5 - 0.5 * 0.5**0.5))
