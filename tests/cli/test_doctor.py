"""`gdfq doctor`."""

import json
from pathlib import Path

import pytest
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
    assert facts["seconds"].keys() == {"images", "tuning"}
    assert main([*arguments, "--recipe", "zeroq", "--placement", "relu"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 batch norms fold" in printed
    assert "1 conv2d, 1 add, 1 linear (its input is not the output of a ReLU" in printed
    assert "measured on one step of each" in printed
