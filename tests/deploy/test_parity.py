"""Files that differ from the student are found and not kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support import networks

from gdfq import GdfqError
from gdfq.deploy.onnx.codes import stored_codes
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.parity import CodesParity, compare_codes
from gdfq.deploy.runtimes import onnx_values
from gdfq.quantized import QuantizedNetwork

NARROW = "relu_into_layers.q"
"""Codes of the first ReLU's output, as they enter a layer."""


def test_file_that_differs_is_not_kept(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing clamp is found beyond the calibrated range, and the previous file stays."""
    path = tmp_path / "q.onnx"
    path.write_bytes(b"before")
    real = to_onnx

    def without_clips(*arguments: Any) -> Any:
        model = onnx.load_from_string(real(*arguments))
        for node in model.graph.node:
            if node.op_type == "Clip":
                node.op_type = "Identity"
                del node.input[1:]
        return model.SerializeToString()

    monkeypatch.setattr("gdfq.deploy.onnx.target.to_onnx", without_clips)
    with pytest.raises(GdfqError, match=r"not kept"):
        small.export(path)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]


def test_first_activation_that_differs_is_named(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = small.export(tmp_path / "q.onnx")
    assert exported.differs_first == ()
    json.dumps(exported.as_values())
    real = onnx_values

    def shifted(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        found[NARROW].reshape(-1)[0] += 1
        return found

    monkeypatch.setattr("gdfq.deploy.onnx.target.onnx_values", shifted)
    ((name, share), *_) = small.export(tmp_path / "q.onnx").differs_first
    assert name == NARROW
    assert share == pytest.approx(1 / (16 * 8 * 64))


def test_codes_that_differ_from_equal_inputs_are_refused(
    small: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnx_values

    def shifted(*arguments: Any, **options: Any) -> Any:
        return {n: v + (n == NARROW) for n, v in real(*arguments, **options).items()}

    monkeypatch.setattr("gdfq.deploy.onnx.target.onnx_values", shifted)
    with pytest.raises(GdfqError, match=rf"at most.*from equal inputs: 100.00% of '{NARROW}', "):
        small.export(tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


def test_codes_are_compared_from_equal_inputs(small: QuantizedNetwork) -> None:
    """One code of the first activation is changed by hand; later codes follow from it and are right."""
    data = to_onnx(small.network, small.card.inputs, {})
    stored = stored_codes(small.network)
    names = [codes.name for codes in stored.values()]
    x = networks.images(4)
    found = onnx_values(data, names, [x], precise=True)
    assert all(one.differ == 0 for one in compare_codes(small.network, [x], found, stored)[0])
    changed = dict(found)
    changed[names[0]] = 255 - found[names[0]]
    (first, second, *_), outputs = compare_codes(small.network, [x], changed, stored)
    torch.testing.assert_close(outputs[0], small(x))  # from codes that were not changed
    assert (first.name, first.differ, first.only_rounded) == (names[0], 1, False)
    assert second.differ > 0.2  # its inputs are now others than the runtime had
    assert CodesParity("few", 0.02, 0.02, 100).only_rounded
    assert not CodesParity("many", 0.02, 0.02, 1000).only_rounded


def test_activation_that_the_file_lacks_is_an_error(small: QuantizedNetwork) -> None:
    data = to_onnx(small.network, small.card.inputs, {})
    with pytest.raises(GdfqError, match=r"has no 'elsewhere\.q'"):
        onnx_values(data, [NARROW, "elsewhere.q"], [networks.images(1)])


def test_file_is_proven_by_its_codes_where_a_network_amplifies_rounding(
    small: QuantizedNetwork,
) -> None:
    """Outputs far from the student's pass only if all codes are nearest and the outputs are theirs."""
    from gdfq.deploy.target import Examples, Job, compare

    x = networks.images(4)
    far = [2 * output for output in small.network.outputs(x)]
    job = Job(small.network, small.card, Path("q.onnx"), (x,))
    examples = Examples((x,), (x,))
    nearest = CodesParity("relu", differ=0.001, wrong=0.0, count=1000)
    compare(job, lambda _: far, examples, [nearest], far)
    others = [output + 1 for output in far]
    for codes, beside in (
        ([nearest], others),
        ([nearest], ()),
        ([replace(nearest, wrong=0.001)], far),
    ):
        with pytest.raises(GdfqError, match="not kept"):
            compare(job, lambda _: far, examples, codes, beside)
