"""The simulated GPU refuses what a GPU refuses, and computes what the CPU does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.simulated_gpu import GPU, GpuTensor, simulated_gpu, values_of
from torch import Tensor, nn

MIXTURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda gpu, cpu: gpu + cpu,
    "sum in place": lambda gpu, cpu: gpu.add_(cpu),
    "sum on the cpu": lambda gpu, cpu: cpu.add_(gpu),
    "number of the cpu changed": lambda gpu, cpu: cpu.sum().add_(gpu.sum()),
    "where": lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
    "cat": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "stack of numbers": lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
    "product": lambda gpu, cpu: gpu @ cpu.T,
    "layer": lambda gpu, _: nn.Linear(3, 2)(gpu),
    "batch norm": lambda gpu, cpu: F.batch_norm(gpu, cpu[0], cpu[0]),
    "index on the gpu": lambda gpu, cpu: cpu[gpu[0].argmax()[None]],
    "comparison": lambda gpu, cpu: torch.equal(gpu, cpu),
    "generator": lambda gpu, _: gpu.normal_(generator=torch.Generator()),
    "new of a generator": lambda *_: torch.randn(2, generator=torch.Generator(), device="cuda"),
    "numpy": lambda gpu, _: gpu.numpy(),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.usefixtures("gpu")
def test_mixture_of_devices_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError):
        MIXTURES[name](torch.ones(2, 3, device="cuda"), torch.ones(2, 3))


@pytest.mark.usefixtures("gpu")
def test_gradient_of_another_device_is_refused_by_the_optimizer() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return grads[0].cpu()

    x = torch.ones(3, device="cuda", requires_grad=True)
    Wrong.apply(x).sum().backward()  # a GPU refuses it here
    with pytest.raises(RuntimeError):
        torch.optim.Adam([x]).step()


ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "number of the cpu": lambda gpu, cpu: gpu * cpu.sum(),
    "index on the cpu": lambda gpu, _: gpu[torch.tensor([1])],
    "mask": lambda gpu, _: gpu[gpu > 0],
    "moved": lambda _, cpu: cpu.to("cuda"),
    "cuda": lambda _, cpu: cpu.cuda(),
    "to another": lambda gpu, cpu: cpu.to(gpu),
    "copied": lambda gpu, cpu: gpu.copy_(cpu),
    "new": lambda gpu, _: gpu.new_tensor([1.0]),
    "made": lambda *_: torch.tensor([1.0], device="cuda"),
    "like": lambda gpu, _: torch.zeros_like(gpu),
    "view": lambda gpu, _: gpu.view(-1)[1:],
    "nonzero": lambda gpu, _: gpu.nonzero(),
}


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.usefixtures("gpu")
def test_result_is_on_the_gpu(name: str) -> None:
    found = ALLOWED[name](torch.ones(2, 3, device="cuda"), torch.ones(2, 3))
    assert isinstance(found, GpuTensor)
    assert found.device == GPU


@pytest.mark.usefixtures("gpu")
def test_numbers_and_copies_reach_the_cpu() -> None:
    x = torch.arange(6.0).view(2, 3).to("cuda")
    assert float(x.sum()) == 15
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert x.cpu().equal(torch.arange(6.0).view(2, 3))
    assert not isinstance(x.cpu(), GpuTensor)
    assert torch.device("cuda").type == "cuda"
    assert torch.empty(2, device="meta").device.type == "meta"


def trained(device: str) -> list[Tensor]:
    """Parameters and statistics of a small network after three updates."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    x = torch.randn(8, 3, 4, 4).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    return [values_of(tensor.detach()) for tensor in network.state_dict().values()]


def test_training_gives_the_numbers_of_the_cpu() -> None:
    expected = trained("cpu")
    with simulated_gpu():
        actual = trained("cuda")
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("gpu")
def test_autocast_narrows_layers_alone() -> None:
    x, w = torch.ones(2, 3, device="cuda"), torch.ones(4, 3, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = F.linear(x, w)
        assert y.dtype == torch.bfloat16
        assert y.relu().dtype == torch.bfloat16
        assert y.softmax(1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert F.linear(x, w).dtype == torch.float32
    y.float().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
