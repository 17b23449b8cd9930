"""`gdfq generate` writes images that tuning accepts."""

from pathlib import Path

import numpy as np
import pytest
from support import networks
from support.command_line import arguments

from gdfq.cli import main


def test_generated_images_are_accepted_as_data(place: Path) -> None:
    made = [*arguments(place, out="fakes", command="generate"), "--count", "10"]
    assert main(made) == 0
    floats = np.load(place / "fakes" / "images.npy")
    assert floats.shape == (10, *networks.SHAPE)
    with np.load(place / "fakes" / "images.npz") as file:
        expected = ((floats * 0.3 + 0.5) * 255).round().clip(0, 255)
        assert np.array_equal(file["images"], expected)
        assert file["labels"].shape == (10,)
    data = ["--recipe", "real", "--data", f"{place}/fakes/images.npz"]
    assert main(arguments(place, *data)) == 0
    assert main(made) == 2  # already there


def test_missing_network_leaves_no_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["generate", f"{place}/net.py:absent", "--input", "3x8x8", "--out", f"{place}/made"]
    assert main(call) == 2
    assert "'absent' is not there" in capsys.readouterr().err
    assert not (place / "made").exists()


def test_options_of_recipes_are_refused_beside_a_pipeline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = ["generate", "file.py:absent", "--generate-with", "diffusers:tiny", "--out", "made"]
    assert main(call) == 2
    assert "must be given without" not in capsys.readouterr().err  # defaults are not given
    for given, named in (
        (["--recipe", "fast"], "--recipe"),
        (["--steps", "5", "--png"], "--steps, --png"),
        (["--memory", "1GiB"], "--memory"),
    ):
        assert main([*call, *given]) == 2
        assert f"{named} must be given without --generate-with" in capsys.readouterr().err


def test_png_folder_is_accepted_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(networks.__file__.rpartition("/")[0])
    network = ["networks:Residual", "--input", "3x8x8", "--mean", ".5,.5,.5", "--std", ".3,.3,.3"]
    made = ["generate", *network, "--recipe", "zeroq", "--count", "5", "--png", "--out", "fakes"]
    assert main(made) == 0
    assert len(list((tmp_path / "fakes" / "png").iterdir())) == networks.CLASSES
    assert len(list((tmp_path / "fakes" / "png").glob("*/*.png"))) == 5
    tuned = ["quantize", *network, "--recipe", "real", "--steps", "4", "--data", "fakes/png"]
    assert main([*tuned, "--no-onnx", "--out", "run"]) == 0
