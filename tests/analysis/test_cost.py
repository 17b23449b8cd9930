"""Estimated time and memory."""

import itertools

import pytest
import torch
from support.narrowing import present

from gdfq.analysis.cost import with_costs
from gdfq.analysis.preflight import diagnose
from gdfq.execution.stopwatch import now, peak_bytes
from gdfq.functional.grid import Bits
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.blocks import block_ends, blocks
from gdfq.graph.capture import Captured
from gdfq.recipes import find_recipe
from gdfq.student.scheme import Scheme

FULL = Scheme(Bits(4, 4), "full")


def test_seconds_of_reconstruction_are_those_of_the_second_update_of_each_block(
    teacher: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances by 1 at each reading: one second for each block and update."""
    ticks = itertools.count()
    monkeypatch.setattr("gdfq.analysis.cost.now", lambda _: float(next(ticks)))
    recipe = find_recipe("genie").with_steps(8)
    found = with_costs(diagnose(teacher, FULL, recipe), teacher, FULL, recipe)
    folded = fold_batch_norms(teacher).network
    assert present(found.seconds)["tuning"] == 7 * len(blocks(folded, block_ends(folded.graph)))


@pytest.mark.parametrize("name", ["fast", "paper", "genie", "round"])
def test_measuring_costs_leaves_the_teacher_unchanged(name: str, teacher: Captured) -> None:
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    recipe = find_recipe(name).with_steps(8)
    found = with_costs(diagnose(teacher, FULL, recipe), teacher, FULL, recipe)
    assert found.seconds is not None
    assert found.seconds["images"] > 0
    assert found.seconds["calibration"] > 0
    assert (present(found.seconds)["tuning"] > 0) == (name != "round")
    assert found.peak_bytes is not None
    assert found.peak_bytes > 2**26
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())


def test_costs_on_a_gpu_synchronize_and_read_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the calls, their device, and the use of their results."""
    device = torch.device("cuda", 1)
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", devices.append)

    def max_memory_reserved(asked: torch.device) -> int:
        devices.append(asked)
        return 12345

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", max_memory_reserved)
    assert now(device) <= now(torch.device("cpu"))
    assert peak_bytes(device) == 12345
    assert devices == [device, device]
