"""Networks that end in a softmax, a sigmoid or a normalisation, from capture to files and report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import networks
from support.choice import checked
from support.narrowing import present
from torch import Tensor, nn

import gdfq
from gdfq import UsageError
from gdfq.analysis.accuracy import Predictions
from gdfq.analysis.accuracy_drop import measure_expected_drop
from gdfq.cli import main
from gdfq.deploy.onnx.session import onnx_session
from gdfq.graph.capture import Captured, capture
from gdfq.quantized import QuantizedNetwork
from gdfq.runs.diagnostics import gather

Plain = tuple[nn.Module, Captured, QuantizedNetwork]
EXAMPLE = networks.images(2)
OPTIONS: dict[str, Any] = {"steps": 6, "seed": 0, "placement": "full"}


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


class Column(nn.Module):
    """The decision of one class alone, [N, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].sigmoid()


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x, "probabilities": x.softmax(-1)}


def quantized(end: nn.Module | None, **options: Any) -> tuple[nn.Module, Captured, Any]:
    """A network with an end, as it was captured, and what `quantize` makes of it."""
    body = networks.make("Residual").eval()
    model = body if end is None else nn.Sequential(body, end).eval()
    teacher = capture(model, EXAMPLE)
    return model, teacher, gdfq.quantize(teacher, None, "w4a4", "quick", **OPTIONS, **options)


def _pixels() -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(256, (40, *networks.SHAPE), dtype=torch.uint8, generator=draw)


@pytest.fixture(scope="module")
def plain() -> Plain:
    """A network that returns logits."""
    return quantized(None)


@pytest.mark.parametrize("end", [nn.Softmax(-1), checked(nn.LogSoftmax(1)), Named()])
def test_end_changes_neither_the_student_nor_what_is_measured(plain: Plain, end: nn.Module) -> None:
    _, teacher, student = plain
    model, other_teacher, other = quantized(end)
    x = networks.images(16, seed=3)
    torch.testing.assert_close(other.network(x), student.network(x), rtol=0, atol=0)
    assert other_teacher.classes == teacher.classes == networks.CLASSES
    first, second = (
        measure_expected_drop(t, s.network, seed=0)
        for t, s in ((teacher, student), (other_teacher, other))
    )
    assert first == second
    confidence = [Predictions.of(t.network(x)).confidence for t in (teacher, other_teacher)]
    torch.testing.assert_close(*confidence)
    # What the network returns is what it returned before, of the student's logits.
    returned, expected = other(x), end(student(x))
    if isinstance(expected, dict):
        assert list(returned) == list(expected)
    torch.testing.assert_close(returned, expected)
    torch.testing.assert_close(other_teacher.returned(x), model(x))


def test_files_return_probabilities(plain: Plain, tmp_path: Path) -> None:
    _, _, student = plain
    _, _, other = quantized(nn.Softmax(1))
    x = networks.images(16, seed=3)
    expected = student(x).softmax(1).detach()
    other.save(tmp_path)
    loaded = gdfq.load(tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(loaded.network(x), student.network(x))
    assert loaded.ends.kinds == ("softmax",)
    for found in (other, loaded):
        onnx_file = found.export(tmp_path / "student.onnx")
        session = onnx_session(onnx_file.path.read_bytes())
        assert [output.name for output in session.get_outputs()] == ["probabilities"]
        (probabilities,) = session.run(None, {"images": x.numpy()})
        np.testing.assert_allclose(probabilities, expected, atol=0.02)
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    program = torch.export.load(other.export(tmp_path / "student.pt2").path)
    torch.testing.assert_close(program.module()(x), expected)


def test_labelled_images_measure_the_same_accuracy(plain: Plain) -> None:
    model = plain[0]
    pixels = _pixels()
    labels = model(pixels / 255).argmax(1)
    results = [quantized(end, test=(pixels, labels))[2] for end in (None, nn.Softmax(1))]
    first, second = (
        {who: result.metrics[who]["top1"] for who in ("teacher", "student")} for result in results
    )
    assert first == second
    assert first["teacher"] == 100
    assert results[1].evaluate((pixels, labels)) == pytest.approx(first["student"], abs=1e-3)
    ours, other = (gather(networks.captured("Residual"), result) for result in results)
    assert ours.sections["test"]["calibration"] == other.sections["test"]["calibration"]


@pytest.mark.parametrize("end", [nn.Sigmoid(), Column()])
def test_sigmoid_is_measured_by_its_decisions(end: nn.Module) -> None:
    pixels = _pixels()
    model, teacher, result = quantized(end, test=pixels)
    x = pixels / 255
    was, now = model(x) > 0.5, result(x) > 0.5
    measured = result.metrics["student"]
    assert teacher.classes is None
    assert measured["decisions_percent"]["probabilities"] == pytest.approx(
        100 * float((was == now).double().mean()),
        abs=2.6,  # rounding may change one of 40 images
    )
    logits, student = teacher.network(x), result.network(x)
    assert measured["error_percent"]["probabilities"] == pytest.approx(
        100 * float((student - logits).norm() / (logits - logits.mean(0)).norm()), rel=1e-3
    )
    torch.testing.assert_close(result(x), student.sigmoid())
    estimate = measure_expected_drop(teacher, result.network, seed=0)
    assert estimate.expected_drop is None
    assert "independent decisions" in estimate.reason
    assert estimate.decisions is not None
    assert 0 < estimate.decisions <= 100
    with pytest.raises(UsageError, match="not classes"):
        result.evaluate((pixels, torch.zeros(40, dtype=torch.long)))


def test_embeddings_are_measured_by_their_cosine() -> None:
    pixels = _pixels()
    model, teacher, result = quantized(Norm(), test=pixels)
    x = pixels / 255
    with torch.no_grad():
        cosine = float((model(x) * result(x)).sum(1).mean())
    assert teacher.classes is None
    assert result.metrics["student"]["cosine"]["output"] == pytest.approx(cosine, abs=1e-5)
    torch.testing.assert_close(result(x).norm(dim=1), torch.ones(40))
    estimate = measure_expected_drop(teacher, result.network, seed=0)
    assert (estimate.expected_drop, estimate.agreement, estimate.kl) == (None, None, None)
    assert "unit vectors" in estimate.reason
    assert estimate.cosine is not None
    assert estimate.relative_error is not None
    # For unit vectors ‖a − b‖² = 2 − 2 cos.
    assert estimate.cosine == pytest.approx(
        1 - (present(estimate.relative_error) / 100) ** 2 / 2, abs=1e-5
    )


def test_normalisation_stays_float_in_any_spelling() -> None:
    """Squares and their sum have a range of their own, which no grid of few codes holds."""

    class BySquares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.pow(2).sum(1, keepdim=True).sqrt()

    x = networks.images(16, seed=3)
    torch.testing.assert_close(quantized(BySquares())[2](x), quantized(Norm())[2](x))


_MODEL = """
import sys
from torch import nn
import torch.nn.functional as F
sys.path.insert(0, {folder!r})
from support import networks
class Norm(nn.Module):
    def forward(self, x):
        return F.normalize(x)
def softmax(): return nn.Sequential(networks.make("Residual"), nn.Softmax(1))
def sigmoid(): return nn.Sequential(networks.make("Residual"), nn.Sigmoid())
def vectors(): return nn.Sequential(networks.make("Residual"), Norm())
"""


@pytest.mark.parametrize(
    ("name", "task", "verdict"),
    [
        ("softmax", "probabilities of 5 classes; the logits in front of the softmax", "accuracy"),
        checked(("sigmoid", "independent decisions", "of the decisions are the original's")),
        checked(
            ("vectors", "unit vectors (embeddings, not classes)", "cosine with the original's")
        ),
    ],
)
def test_doctor_terminal_and_report_say_what_is_measured(
    name: str, task: str, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(_MODEL.format(folder=str(Path(networks.__file__).parents[1])))
    network = [f"{file}:{name}", "--input", "3x8x8", "--recipe", "quick", "--steps", "6"]
    assert main(["doctor", *network]) == 0
    assert task in capsys.readouterr().out
    assert main(["doctor", *network, "--json"]) == 0
    assert task in json.loads(capsys.readouterr().out)["task"]
    images = tmp_path / "images.npz"
    pixels = torch.randint(256, (8, *networks.SHAPE), dtype=torch.uint8).numpy()
    if name == "softmax":
        np.savez(images, images=pixels, labels=np.zeros(8, np.int64))
    else:
        np.savez(images, images=pixels)
    out = tmp_path / "run"
    assert main(["quantize", *network, "--out", str(out), "--test", str(images)]) == 0
    printed = capsys.readouterr().out
    assert task in printed
    assert verdict in printed
    page = (out / "report.html").read_text()
    assert task.split(";")[0] in page
    measured = json.loads((out / "metrics.json").read_text())["student"]
    assert (
        measured.keys()
        == {
            "softmax": {"top1"},
            "sigmoid": {"error_percent", "decisions_percent"},
            "vectors": {"error_percent", "cosine"},
        }[name]
    )
    if name == "vectors":
        assert "mean cosine with the original" in page
        assert "points of accuracy" not in page
