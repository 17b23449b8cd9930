"""The memory budget, and what activations take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import networks

import gdfq
from gdfq.errors import UsageError
from gdfq.execution.budget import MemoryBudget, parse_bytes
from gdfq.execution.context import Context
from gdfq.functional.grid import Bits
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.quantizers.lsq import LearnedRange
from gdfq.quantizers.minmax import MovingRange
from gdfq.recipes import QUICK, Recipe
from gdfq.sources.base import Batch
from gdfq.sources.pool import ImagePool
from gdfq.sources.spectral import SpectralSource
from gdfq.student.build import Student, build_student
from gdfq.student.scheme import Scheme
from gdfq.tuning.calibrate import calibrate_
from gdfq.tuning.moment_matching import match_moments_

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("1.5KiB", 1536),
        ("2 GiB", 2**31),
        ("3MB", 3_000_000),
        ("0", None),
        ("a", None),
    ],
)
def test_parse_bytes_reads_units(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


def test_budget_accepts_text_bytes_and_none() -> None:
    assert MemoryBudget.of("2GiB") == MemoryBudget.of(2**31) == MemoryBudget(2**31)
    assert MemoryBudget.of(None) == MemoryBudget()
    assert MemoryBudget.of(MemoryBudget(7)) == MemoryBudget(7)


@pytest.mark.parametrize("memory", ["much", "0", 0, -1, 1.5])
def test_budget_refuses_invalid_sizes(memory: Any) -> None:
    with pytest.raises(UsageError, match="memory must be a positive number of bytes"):
        MemoryBudget.of(memory)


def test_budget_fits_at_least_one_image() -> None:
    assert [MemoryBudget(100).images(size, CPU) for size in (30, 100, 101)] == [3, 1, 1]
    assert MemoryBudget().room(CPU) == 5 * 2**28


QUICKEST = replace(
    QUICK, source=ImagePool(SpectralSource(batch=8, iterations=3), images=24, batch=12), steps=8
)


@pytest.mark.parametrize("name", ["tiny", "quickest"])
def test_run_does_not_depend_on_its_budget(name: str, tiny: Recipe) -> None:
    """Images are the same to the bit; students are equally near to the network.

    Batches in parts have the same ranges, but moments are means over parts, and gradients sums over
    them, which rounds otherwise; this budget also splits the batches of tuning further, and the
    errors of features are relative to each part. Four bits then make another student as good.
    """
    network, example = networks.make("Residual"), networks.images(2)
    recipe = {"tiny": tiny, "quickest": QUICKEST}[name]
    small, large = (
        gdfq.quantize(network, example, "w4a4", recipe, memory=memory, seed=1)
        for memory in ("100KB", "1GiB")
    )
    assert torch.equal(*small.examples, *large.examples)
    images = networks.images(64)
    with torch.no_grad():
        few, many, exact = (module(images) for module in (small, large, network.eval()))
    assert float((few - exact).norm()) == pytest.approx(float((many - exact).norm()), rel=0.3)


@pytest.mark.parametrize("sizes", [(8,), (3, 5), (1, 1, 6)])
@pytest.mark.parametrize("kind", [LearnedRange, MovingRange])
def test_ranges_of_parts_are_those_of_the_whole_batch(
    sizes: tuple[int, ...], kind: type[LearnedRange] | type[MovingRange]
) -> None:
    batch = torch.randn(8, 5, 61, 61, generator=torch.Generator().manual_seed(0))
    batch = batch.contiguous(memory_format=torch.channels_last)
    whole, parts = kind(4), kind(4)
    for x in (batch, 0.5 * batch):
        whole.observe_(x)
        parts.observe_(*x.split(list(sizes)))
    assert [a.item() for a in whole.grid()] == [a.item() for a in parts.grid()]


def student_of(teacher: Captured, memory: MemoryBudget) -> Student:
    student = build_student(teacher, Scheme(Bits(4, 4), "full"), quantizers=QUICK.quantizers).eval()
    batches = [Batch((networks.images(10, seed=seed),), None, None) for seed in range(2)]
    calibrate_(student, batches, steps=2, context=Context(memory=memory))
    return student


TINY = MemoryBudget(30_000)


def test_calibration_in_parts_gives_the_same_ranges(teacher: Captured) -> None:
    assert forward_images(teacher.network.graph, TINY, CPU) < 10
    whole, parts = (student_of(teacher, memory) for memory in (MemoryBudget(), TINY))
    expected = whole.ranges()
    assert expected
    assert parts.ranges() == pytest.approx(expected, rel=1e-4)


def test_moments_of_parts_are_those_of_the_whole_batch(teacher: Captured) -> None:
    images = networks.images(20)
    students = [student_of(teacher, MemoryBudget()) for _ in range(2)]
    before = students[0](images)
    for student, memory in zip(students, (MemoryBudget(), TINY), strict=True):
        match_moments_(student, teacher, (images,), Context(memory=memory))
    whole, parts = (student(images) for student in students)
    assert not torch.allclose(before, whole, rtol=1e-2)
    # A value at the border between two codes may round the other way.
    assert ((whole - parts).norm() / whole.norm()) < 0.02
