"""Activation recomputation: the same gradients with less memory."""

import pytest
import torch
import torch.nn.functional as F
from support import networks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from gdfq.functional.grid import Bits
from gdfq.graph.capture import capture
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.lsq import learned_scale
from gdfq.quantizers.recompute import recomputing
from gdfq.sources.base import Batch
from gdfq.student.build import build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_

ZERO = torch.tensor(-3.0)


def quantized(x: Tensor) -> Tensor:
    return learned_scale(x, torch.tensor(0.25, requires_grad=True), ZERO, 4)


CONSUMERS = {
    "linear": lambda q: F.linear(q, torch.ones(2, 6)),
    "transposed": lambda q: q.transpose(1, 2) @ q,
    "part": lambda q: q[:, 1:, ::2] * q[:, 1:, 1::2],
    "gelu": F.gelu,
    "norm": lambda q: F.layer_norm(q, (6,)),
    "twice": lambda q: F.gelu(q) + q.square(),
}


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize("layout", [(0, 1, 2), (2, 0, 1)])
def test_recomputed_gradients_are_the_same(name: str, layout: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    x = x.permute(layout).contiguous().permute([layout.index(d) for d in range(3)])
    found = []
    for again in (False, True):
        leaf, step = x.clone().requires_grad_(), torch.tensor(0.25, requires_grad=True)
        with recomputing() if again else saved_tensors_hooks(lambda t: t, lambda t: t):
            y = CONSUMERS[name](learned_scale(leaf, step, ZERO, 4))
        found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, step))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_recomputed_graph_can_be_used_twice() -> None:
    x = torch.randn(3, 4, 6, requires_grad=True)
    with recomputing():
        y = F.gelu(quantized(x)).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("again", [True, False])
def test_quantized_tensor_is_freed_after_the_forward_pass(again: bool) -> None:
    x = torch.randn(3, 4, 6, requires_grad=True)
    with recomputing() if again else saved_tensors_hooks(lambda t: t, lambda t: t):
        q = quantized(x)
        y = F.gelu(q)
    memory = StorageWeakRef(q.untyped_storage())
    del q
    assert memory.expired() == again
    y.sum().backward()
    assert memory.expired()


@pytest.mark.parametrize("name", ["Residual", "Branches", "Transformer"])
def test_recomputing_student_learns_the_same(name: str) -> None:
    shape = networks.shape_of(name)
    teacher = capture(networks.make(name), torch.zeros(1, *shape))
    images = networks.images(6, shape=shape)
    found = []
    for again in (True, False):
        student = build_student(teacher, Scheme(Bits(4, 4), "full"), quantizers=LSQ)
        calibrate_(student, [Batch((images,), None, None)], steps=1)
        outputs = student(images) if again else student.network(images)
        outputs.square().sum().backward()
        found.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(found[0]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
