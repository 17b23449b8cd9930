"""`gdfq doctor`."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support import networks

from gdfq.cli.app import main


def test_doctor_prints_json_or_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    source = (networks.__file__, networks.__name__)
    file.write_text(f"import sys\nsys.path.insert(0, {str(source[0].rpartition('/')[0])!r})\n"
                    "import networks\ndef net(): return networks.make('Residual')\n")  # fmt: skip
    arguments = ["doctor", f"{file}:net", "--input", "3x8x8", "--steps", "8"]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in facts["layers"]] == ["conv1", "conv2", "fc"]
    assert facts["seconds"].keys() == {"images", "calibration", "tuning"}
    assert main([*arguments, "--recipe", "zeroq", "--placement", "relu"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 batch norms fold" in printed
    assert "1 conv2d, 1 add, 1 linear (its input is not the output of a ReLU" in printed
    assert "measured on one step of each" in printed
    assert main([*arguments, "--target", "onnx"]) == 0
    printed = capsys.readouterr().out
    assert f"target      onnx: the network fits\n{'':12}file         student.onnx\n" in printed


def test_doctor_says_what_a_target_changes_and_that_its_runtime_is_absent(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a network fits can be known before a runtime is installed."""
    monkeypatch.setattr("gdfq.deploy.target.find_spec", lambda _: None)
    words = ["doctor", f"{place}/net.py:factory", "--input", "3x8x8", "--steps", "8"]
    assert main([*words, "--target", "openvino"]) == 1
    printed = capsys.readouterr().out
    assert "target      openvino: the network fits\n" in printed
    assert "placement    full\n" in printed
    assert "problem     a file for OpenVINO is kept only if it is equal there" in printed
    assert main([*words, "--target", "tensorrt", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["target"]["name"] == "tensorrt"
    assert "128 of 256" in facts["target"]["changes"]
    assert len(facts["problems"]) == 1
    assert "pip install 'gdfq'" in facts["problems"][0]
    assert main([*words, "--target", "openvino", "--placement", "relu"]) == 2
    assert "needs placement full" in capsys.readouterr().err


def test_doctor_names_the_line_where_tracing_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And prints nothing of what PyTorch prints of the graph."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        if x.sum() > 0:\n"
        "            return x\n"
        "        return -x\n"
    )
    assert main(["doctor", f"{tmp_path}/net.py:Net", "--input", "3x8x8"]) == 2
    printed = capfd.readouterr().err
    assert f"{tmp_path}/net.py:4: if x.sum() > 0:. Make its forward" in printed
    assert "torch.ops" not in printed


def test_doctor_asks_for_the_weights_of_batch_norms_that_never_learned(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "new.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())\n"
        "def trained():\n"
        "    found = net()\n"
        "    found[1].running_mean.fill_(0.5)\n"
        "    return found\n"
    )
    asked = "all batch norms hold mean 0 and variance 1"
    assert main(["doctor", f"{place}/new.py:net", "--input", "3x8x8"]) == 0
    assert asked in capsys.readouterr().out
    assert main(["doctor", f"{place}/new.py:trained", "--input", "3x8x8"]) == 0
    assert asked not in capsys.readouterr().out


def test_doctor_says_what_is_taken_of_weights_and_images(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("1", "4"):
        (place / "images" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "images" / label / "x.png")
    words = ["doctor", f"{place}/net.py:factory", "--weights", f"{place}/nested.pt"]
    words += ["--input", "3x8x8", "--steps", "8", "--mean", ".5,.5,.5", "--std", ".3,.3,.3"]
    assert main([*words, "--test", f"{place}/images", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weights"].endswith("nested.pt, 'state_dict' behind the prefix 'module.'")
    assert facts["test"] == "2 images; labels by the numbers that name the folders"
    assert facts["pixels"].endswith("mean 0.5, 0.5, 0.5, std 0.3, 0.3, 0.3")


def test_doctor_refuses_images_of_unknown_class_and_mean_of_bytes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "images" / "cat" / "x.png")
    words = ["doctor", f"{place}/net.py:factory", "--input", "3x8x8"]
    assert main([*words, "--test", f"{place}/images"]) == 2
    assert "5 classes; there are 1: cat" in capsys.readouterr().err
    assert main([*words, "--mean", "127.5,127.5,127.5"]) == 2
    assert "Give mean 0.5, 0.5, 0.5" in capsys.readouterr().err
