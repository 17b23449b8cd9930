"""`.pte` files against the student, in ExecuTorch with XNNPACK; their form, in PyTorch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import networks
from support.choice import checked, every_second
from support.small_runs import quantized_by_fast

import gdfq
from gdfq import UsageError
from gdfq.deploy.benchmark import Candidate, side_by_side
from gdfq.deploy.executorch.program import pairs_of
from gdfq.deploy.executorch.runtime import executorch_runners
from gdfq.deploy.executorch.target import EXECUTORCH
from gdfq.deploy.litert.carriers import carriers_of
from gdfq.deploy.parity import compare_codes
from gdfq.deploy.target import Job
from gdfq.functional.grid import Bits
from gdfq.quantized import QuantizedNetwork
from gdfq.student.scheme import Placement, Scheme

REFUSED = {"Awkward": r"max_1 \(max\), max_2 \(max\)\."}
"""Networks with an operator that a file has no form for."""
FITTING = [name for name in networks.NETWORKS if name not in REFUSED]


@pytest.mark.parametrize(("bits", "placement"), [("w4a4", "full"), checked(("w8a8", "relu"))])
@pytest.mark.parametrize(
    "name", every_second([*FITTING, "Detector", "Segmenter", "Audio", "Transformer"])
)
def test_form_has_the_codes_of_the_student(name: str, bits: str, placement: Placement) -> None:
    """PyTorch computes the form as it is written, each operator in floats."""
    if (name, placement) == ("Transformer", "relu"):
        pytest.skip("it has no ReLU")
    shape = networks.shape_of(name)
    quantized = quantized_by_fast(networks.captured(name), bits, placement, shape)
    network, inputs = quantized.network, quantized.card.inputs
    form = pairs_of(network, inputs, with_codes=True)
    stored = carriers_of(network)
    images = networks.images(8, seed=3, shape=shape)
    for x in (images, 3 * images):
        expected = network.outputs(x)
        found = form(x)
        codes = found[len(expected) :]
        by_name = {
            stored[grid.name].name: value.numpy()
            for grid, value in zip(network.activations, codes, strict=True)
        }
        parities, outputs = compare_codes(network, [x], by_name, stored)
        assert all(parity.only_rounded for parity in parities)
        assert all(value.dtype == torch.int8 for value in codes)
        for actual, output in zip(found, outputs, strict=False):
            torch.testing.assert_close(actual, output, rtol=1e-4, atol=1e-4)


def test_weights_are_codes_without_zero_points(small: QuantizedNetwork) -> None:
    form = pairs_of(small.network, small.card.inputs)
    weight = small.network.weights[0]
    stored = [value for value in form.buffers() if value.dtype == torch.int8]
    assert stored[0].equal((weight.codes - weight.zero_point).to(torch.int8))
    assert len(stored) == len(small.network.weights) - 1  # the last layer's output is not rounded


@pytest.mark.parametrize("name", REFUSED)
def test_operator_without_a_form_is_refused_before_the_run(name: str) -> None:
    with pytest.raises(UsageError, match=rf"there is none for: {REFUSED[name]}"):
        EXECUTORCH.check_scheme(networks.captured(name), Scheme(Bits(4, 4), "full"))


def test_volumes_are_refused_by_layer() -> None:
    with pytest.raises(UsageError, match=r"stem\.0 \(conv3d\)"):
        EXECUTORCH.check_scheme(networks.captured("Volume"), Scheme(Bits(8, 8), "full"))


def test_missing_executorch_names_the_extra(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdfq.deploy.target.find_spec", lambda module: None)
    with pytest.raises(UsageError, match=r"ExecuTorch must be .*pip install 'gdfq\[executorch\]'"):
        small.export(tmp_path / "q.pte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.check
@pytest.mark.usefixtures("executorch")
@pytest.mark.parametrize("name", [*FITTING[::2], "Detector", "Transformer"])
def test_file_is_equal_in_executorch(name: str, tmp_path: Path) -> None:
    """Half of the networks, for each takes long; all have their form checked above."""
    shape = networks.shape_of(name)
    quantized = quantized_by_fast(networks.captured(name), "w4a4", "full", shape)
    exported = quantized.export(tmp_path / "q.pte")
    assert exported.target == "executorch"
    assert exported.inside.relative_error < 1e-5
    assert exported.beyond.relative_error < 1e-5
    assert exported.differs_first == ()
    assert [path.name for path in tmp_path.iterdir()] == ["q.pte"]


@pytest.mark.check
@pytest.mark.usefixtures("executorch")
def test_file_takes_batches_and_is_timed(small: QuantizedNetwork, tmp_path: Path) -> None:
    small.export(tmp_path / "q.pte")
    with executorch_runners((tmp_path / "q.pte").read_bytes()) as (run,):
        for count in (1, 33):
            x = networks.images(count)
            torch.testing.assert_close(run(x)[0], small(x), rtol=1e-4, atol=1e-4)
    assert EXECUTORCH.runtime is not None
    files = [Candidate("q.pte", tmp_path / "q.pte", EXECUTORCH.runtime)]
    rows = list(side_by_side(files, [networks.SHAPE], seconds=0.01, batches=[1, 32], threads=[1]))
    assert [row[0].batch for row in rows] == [1, 32]
    with pytest.raises(UsageError, match=r"takes up to 32 images at once; got 33"):
        list(side_by_side(files, [networks.SHAPE], batches=[33], threads=[1]))


@pytest.mark.check
@pytest.mark.usefixtures("executorch")
def test_file_that_differs_is_not_kept(small: QuantizedNetwork, tmp_path: Path) -> None:
    """The file of a network with other weights."""
    other = quantized_by_fast(networks.captured("Residual"), "w2a8")
    written = EXECUTORCH.write

    def write(job: Job) -> bytes:
        return written(replace(job, network=other.network))

    with pytest.raises(gdfq.GdfqError, match=r"It was not kept"):
        small.export(tmp_path / "q.pte", target=replace(EXECUTORCH, write=write))
    assert list(tmp_path.iterdir()) == []
