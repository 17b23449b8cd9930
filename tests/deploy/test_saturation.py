"""8-bit sums that saturate on some processors."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from support import networks
from support.small_runs import quantized_by_fast
from torch import Tensor

from gdfq import GdfqError
from gdfq.deploy.onnx.session import PRECISE
from gdfq.deploy.runtimes import onnx_runner
from gdfq.deploy.saturation import layers_that_may_overflow, without_overflow
from gdfq.quantized import QuantizedNetwork


def test_safe_x86_writes_7_bit_weights_where_sums_may_saturate(tmp_path: Path) -> None:
    quantized = quantized_by_fast(networks.captured("Residual"), "w8a8")
    risky = layers_that_may_overflow(quantized.network)
    assert risky == [f"quantized.{name}.codes" for name in ("conv1", "conv2", "fc")]
    quantized.export(tmp_path / "risky.onnx")
    exported = quantized.export(tmp_path / "safe.onnx", safe_x86=True)
    assert exported.inside.relative_error < 0.01
    facts = {e.key: e.value for e in onnx.load(tmp_path / "safe.onnx").metadata_props}
    assert facts["x86_without_vnni"] == "safe"
    facts = {e.key: e.value for e in onnx.load(tmp_path / "risky.onnx").metadata_props}
    assert "--safe-x86" in facts["x86_without_vnni"]
    assert "=".join(PRECISE) in facts["x86_without_vnni"]
    run = onnx_runner((tmp_path / "risky.onnx").read_bytes(), precise=True)
    (logits,) = run(networks.images(8))
    torch.testing.assert_close(logits, quantized(networks.images(8)), rtol=1e-3, atol=1e-3)
    network = without_overflow(quantized.network)
    assert layers_that_may_overflow(network) == []
    x = networks.images(8)
    error = (network(x) - quantized(x)).norm() / quantized(x).norm()
    assert float(error) < 0.05


@pytest.mark.parametrize("bits", ["w2a8", "w4a8", "w7a8"])
def test_layers_of_fewer_than_8_bits_cannot_saturate(bits: str) -> None:
    """Each layer's bits are those of a default run: with 2 bits the ends have more."""
    network = quantized_by_fast(networks.captured("Residual"), bits).network
    assert max(network.code_bits().values()) < 8
    assert layers_that_may_overflow(network) == []


def test_fewer_bits_keep_the_sum_of_each_channel() -> None:
    """What lies between two codes is rounded up as often as down; none moves by a whole code."""
    network = quantized_by_fast(networks.captured("Residual"), "w8a8").network
    bits = network.code_bits()
    for before, after in zip(
        network.weights, network.with_bits(dict.fromkeys(bits, 7)).weights, strict=True
    ):
        change = (after.codes.float() - before.codes.float() / 2).flatten(1)
        is_last = before.codes.flatten(1) == 127  # 63.5 has no code above it
        assert (change.abs() <= 0.5).all()
        assert (change.sum(1).abs() <= 0.5 + 0.5 * is_last.sum(1)).all()
        torch.testing.assert_close(after.scale, 2 * before.scale)
    assert {weight.bits for weight in network.with_bits(dict.fromkeys(bits, 7)).weights} == {7}


def _saturating(monkeypatch: pytest.MonkeyPatch, also_precise: bool = False) -> None:
    """Let sessions double the outputs, as a processor without VNNI changes them."""
    real = onnx_runner

    def runner(data: bytes, *, precise: bool = False) -> Callable[[Tensor], list[Tensor]]:
        run = real(data, precise=precise)
        factor = 1 if precise and not also_precise else 2
        return lambda images: [factor * output for output in run(images)]

    monkeypatch.setattr("gdfq.deploy.onnx.target.onnx_runner", runner)


@pytest.fixture(scope="module")
def wide() -> QuantizedNetwork:
    return quantized_by_fast(networks.captured("Residual"), "w8a8")


def test_file_that_saturates_on_this_processor_is_kept_with_a_note(
    wide: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saturating(monkeypatch)
    exported = wide.export(tmp_path / "q.onnx")
    assert exported.saturates_here
    (loud,) = (note for note in exported.notes if "SATURATE" in note)
    assert "--safe-x86" in loud
    assert "session.x64quantprecision=1" in loud
    assert exported.as_values()["saturates_here"] is True


def test_difference_without_possible_saturation_is_refused(
    small: QuantizedNetwork, wide: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saturating(monkeypatch)
    with pytest.raises(GdfqError, match="not kept"):
        small.export(tmp_path / "q.onnx")
    with pytest.raises(GdfqError, match="not kept"):
        wide.export(tmp_path / "q.onnx", safe_x86=True)
    _saturating(monkeypatch, also_precise=True)
    with pytest.raises(GdfqError, match="not kept"):
        wide.export(tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []
