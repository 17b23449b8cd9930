"""ONNX files of language models: tokens of any length, products of whole numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.choice import checked
from support.language_model import captured_model, tokens

import gdfq
from gdfq.deploy.runtimes import onnx_runner
from gdfq.deploy.saturation import layers_that_may_overflow
from gdfq.errors import GdfqError
from gdfq.graph.tensors import tensors_of
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import RECIPES, Recipe
from gdfq.sources.own_text import OwnText, Sampling

_SOURCE = OwnText(sequences=16, batch=16, sampling=Sampling(length=12))
_QUICK: Recipe = replace(RECIPES["text-quick"], source=_SOURCE, steps=1, calibration=1, warmup=1)
_ROUND: Recipe = replace(_QUICK, fit_weights=False, equalizer=None)
_LINEAR = 14
"""Linear layers of the model, without its head."""


def _quantized(bits: str, **options: Any) -> QuantizedNetwork:
    return gdfq.quantize(captured_model(), bits=bits, **{"recipe": _ROUND, **options})


@pytest.mark.parametrize(
    ("bits", "options", "products"),
    [
        ("w4a8", {"recipe": _QUICK}, _LINEAR),
        checked(("w8a8", {}, _LINEAR)),
        checked(("w2a4", {}, _LINEAR)),
        checked(("w4a8", {"group_size": 7}, 0)),
        checked(("w4a16", {}, 0)),
        checked(("w4a4", {"equalizer": "reassembly"}, _LINEAR)),
        checked(("w4a4", {"equalizer": "smooth"}, _LINEAR)),
        checked(("w8a8", {"layer_bits": ["last=8"]}, _LINEAR + 1)),
    ],
)
def test_file_computes_the_student_for_any_length_and_batch(
    bits: str, options: dict[str, Any], products: int, tmp_path: Path
) -> None:
    found = _quantized(bits, **options)
    exported = found.export(tmp_path / "model.onnx")
    assert exported.inside.relative_error < 1e-2
    nodes = onnx.load(exported.path).graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == products
    assert not any(node.op_type == "DequantizeLinear" for node in nodes)
    run = onnx_runner(exported.path.read_bytes(), precise=True)
    for count, length in ((1, 2), (3, 32), (5, 7)):
        given = tokens(count=count, length=length, seed=length)
        (actual,) = run(given)
        assert actual.shape == (count, length, 40)
        # A code that rounds otherwise changes one token of a sequence.
        error = (actual - found(given)).norm(dim=-1) / found(given).norm(dim=-1)
        assert error.median() < 1e-4


def test_file_whose_codes_are_wrong_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdfq.deploy.onnx import tokens as written

    found = _quantized("w4a8")
    monkeypatch.setattr(written, "code_bounds", lambda bits: (-(2 ** (bits - 1)), 100))
    with pytest.raises(GdfqError, match=r"Codes that differ first.*q\.tokens\.q"):
        found.export(tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.check
def test_safe_weights_cannot_saturate_and_the_file_is_equal(tmp_path: Path) -> None:
    found = _quantized("w8a8")
    exported = found.export(tmp_path / "model.onnx", safe_x86=True)
    assert exported.inside.relative_error < 0.1
    assert not any("saturate" in note for note in exported.notes)


def test_token_of_zeros_stays_zero(tmp_path: Path) -> None:
    model = captured_model()
    with torch.no_grad():
        for table in tensors_of(model.network).values():
            if table.shape == (40, 16):
                table[3] = 0
    found = gdfq.quantize(model, bits="w8a8", recipe=_ROUND)
    exported = found.export(tmp_path / "model.onnx")
    (actual,) = onnx_runner(exported.path.read_bytes())(torch.full((1, 4), 3))
    assert np.isfinite(actual.numpy()).all()
    torch.testing.assert_close(actual, found(torch.full((1, 4), 3)))


def test_sums_of_tokens_may_saturate_with_weights_of_8_bits_alone() -> None:
    """255 x 127 twice exceeds 16 bits; 255 x 7 twice does not."""
    assert len(layers_that_may_overflow(_quantized("w8a8").network)) == _LINEAR
    assert not layers_that_may_overflow(_quantized("w4a8").network)
    assert not layers_that_may_overflow(_quantized("w8a8", group_size=8).network)
