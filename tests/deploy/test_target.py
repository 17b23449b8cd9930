"""What targets state, and what they refuse before a run and before an export."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from support import networks
from torch import fx

import gdfq
from gdfq import TARGETS, GdfqError, UsageError
from gdfq.deploy.export import OTHER_NAMES, find_target, named_target
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe

ONNX = TARGETS["onnx"]


@pytest.mark.parametrize(("layer_bits", "oldest"), [
    ([], "1.18"), (["conv1=7"], "1.21"), (["conv1=4"], "1.23"), (["conv1=4", "fc=2"], "1.24"),
    (["conv1=float"], "1.18"),
])  # fmt: skip
def test_file_says_the_oldest_version_that_loads_it(
    layer_bits: list[str], oldest: str, tiny: Recipe, tmp_path: Path
) -> None:
    """The weight with the fewest bits decides."""
    teacher, image = networks.captured("Residual"), networks.images(1)
    quantized = gdfq.quantize(teacher, image, "w8a8", tiny, layer_bits=layer_bits)
    exported = quantized.export(tmp_path / "q.onnx")
    assert f"needs ONNX Runtime {oldest} or newer" in exported.notes
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "q.onnx").metadata_props}
    assert facts["onnxruntime"] == f">={oldest}"


def test_target_is_found_by_name_or_by_the_longest_suffix(tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        assert named_target(name) is target
        assert find_target(None, tmp_path / target.file_name) is target
    assert named_target("onnxruntime") is ONNX
    assert set(OTHER_NAMES.values()) <= set(TARGETS)
    assert not set(OTHER_NAMES) & set(TARGETS)
    assert find_target(None, Path("some.net.onnx")) is ONNX


def test_every_target_states_what_proves_it() -> None:
    names = [target.file_name for target in TARGETS.values()]
    assert len(set(names)) == len(names)
    for target in TARGETS.values():
        assert target.runtime is not None
        bounds = [bits for bits, _ in target.runtime.oldest]
        assert bounds == sorted(bounds)


def test_oldest_version_is_that_of_the_next_lower_bound(small: QuantizedNetwork) -> None:
    """The network has weights of 4 bits."""
    assert Runtime("", "", oldest=((2, "b"), (5, "a"))).oldest_for(small.network) == "b"
    assert Runtime("", "", oldest=((2, "c"), (4, "b"), (5, "a"))).oldest_for(small.network) == "b"
    assert Runtime("", "").oldest_for(small.network) is None


@pytest.mark.parametrize(("carrier", "bits", "zero_point", "refusal"), [
    (Carrier("int8"), 2, None, ""),
    (Carrier("int8", (4, 8)), 5, None, "5 bits"),
    (Carrier("int8", symmetric=True), 4, torch.tensor([0.0, 0.0]), ""),
    (Carrier("int8", symmetric=True), 4, torch.tensor([0.0, 1.0]), "zero points other than 0"),
    (Carrier("int8", symmetric=True), 4, None, ""),
])  # fmt: skip
def test_carrier_refuses_grids_that_it_cannot_hold(
    carrier: Carrier, bits: int, zero_point: torch.Tensor | None, refusal: str
) -> None:
    assert carrier.refusal(bits, zero_point) == refusal


def test_carrier_is_described_in_words() -> None:
    assert Carrier("int8").in_words() == "int8, 2 to 8 bits"
    assert Carrier("int8", (8,), symmetric=True).in_words() == "int8, 8 bits, zero points of 0"
    assert Carrier("int4", (4, 8)).in_words() == "int4, 4 or 8 bits"


def _unwritten(_job: Job) -> bytes:
    raise AssertionError("a network that does not fit must not be written")


def _unproven(_job: Job, _path: Path) -> Proof:
    raise AssertionError


NARROW = Target(
    "narrow", ".narrow", "", _unwritten, _unproven,
    weights=Carrier("int8", (8,)), activations=Carrier("int8", symmetric=True),
)  # fmt: skip


def _sums(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if "add" in node.name]


def test_network_that_does_not_fit_is_refused_by_layer(
    small: QuantizedNetwork, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        small.export(tmp_path / "q.narrow", target=NARROW)
    assert "weights of 8 bits and activations of 2 to 8 bits, zero points of 0" in str(
        refused.value
    )
    assert "4 bits in conv1, conv2, fc; zero points other than 0 in x, " in str(refused.value)
    assert "again with --target narrow and other --bits, or" in str(refused.value)
    with pytest.raises(UsageError, match=r"there is none for: add"):
        small.export(tmp_path / "q.narrow", target=replace(NARROW, unsupported=_sums))
    assert list(tmp_path.iterdir()) == []


def test_run_that_would_not_fit_is_refused_before_it_begins(tiny: Recipe) -> None:
    teacher, image = networks.captured("Residual"), networks.images(1)
    with pytest.raises(UsageError, match=r"would give 4 bits in conv1, fc\. Choose other"):
        gdfq.quantize(teacher, image, "w4a8", tiny, target=NARROW, layer_bits=["conv2=8"])
    fewer = replace(NARROW, weights=Carrier("int8"), activations=Carrier("int8", (8,)))
    with pytest.raises(UsageError, match="would give 4 bits in relu"):
        gdfq.quantize(teacher, image, "w4a4", tiny, target=fewer, placement="relu")
    with pytest.raises(UsageError, match=r"none for: add"):
        gdfq.quantize(teacher, image, "w8a8", tiny, target=replace(NARROW, unsupported=_sums))
    with pytest.raises(UsageError, match="one of onnx, "):
        gdfq.quantize(teacher, image, "w8a8", tiny, target="nowhere")
    with pytest.raises(UsageError, match="for the size of the file of target 'onnx'"):
        gdfq.quantize(teacher, image, "auto", tiny, target="pt2", size=10_000)
    plan = resolve(teacher, image, "w8a8", tiny, target="onnxruntime")
    assert plan.target is ONNX
    assert plan.as_values()["target"] == "onnx"


def test_absent_runtime_is_an_error_that_names_the_extra(
    small: QuantizedNetwork, tiny: Recipe, tmp_path: Path
) -> None:
    """What does not fit is said first: nobody installs a runtime for a file that it cannot have."""
    narrow = replace(NARROW, runtime=Runtime("Some Runtime", "no_such_module", "some"))
    with pytest.raises(UsageError, match="this network has 4 bits in conv1"):
        small.export(tmp_path / "q.narrow", target=narrow)
    absent = replace(narrow, weights=Carrier("int8"), activations=Carrier("int8"))
    for call in (
        lambda: small.export(tmp_path / "q.narrow", target=absent),
        lambda: gdfq.quantize(networks.captured("Residual"), target=absent, recipe=tiny),
    ):
        with pytest.raises(UsageError, match=r"Some Runtime must be .*pip install 'gdfq\[some\]'"):
            call()


def test_file_that_is_not_equal_is_not_kept(small: QuantizedNetwork, tmp_path: Path) -> None:
    def refuses(job: Job, path: Path) -> Proof:
        assert path.read_bytes() == b"new"
        raise GdfqError("differs")

    (tmp_path / "q.narrow").write_bytes(b"old")
    target = Target("narrow", ".narrow", "", lambda job: b"new", refuses)
    with pytest.raises(GdfqError, match="differs"):
        small.export(tmp_path / "q.narrow", target=target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
