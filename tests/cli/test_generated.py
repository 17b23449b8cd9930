"""`gdfq quantize --generate-with`: a run with images of a tiny random pipeline of diffusers."""

import json
from pathlib import Path

import pytest
import torch
from support import networks
from support.command_line import arguments
from support.tiny_pipeline import saved_pipeline

import gdfq
from gdfq.cli import main
from gdfq.errors import UsageError

CLASSES = networks.CLASSES


def words_of(place: Path, guidance: str) -> list[str]:
    names = place / "names.txt"
    names.write_text("".join(f"class {index}\n" for index in range(CLASSES)))
    words = arguments(
        place, "--generate-with", f"diffusers:{place / 'tiny'}", "--classes", str(names),
        "--guidance", guidance, "--denoising-steps", "1", "--images", "4", "--iterations", "1",
        "--no-onnx",
    )  # fmt: skip
    words[words.index("paper")] = "quick"
    words.remove("--no-report")
    return words


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_one_command_makes_the_images_and_quantizes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_pipeline(place / "tiny", classes=CLASSES)
    assert main(words_of(place, "3.5")) == 2
    assert "Use guidance 1" in capsys.readouterr().err
    out = place / "out"
    assert not list(out.glob("generated/*.png"))
    # Another guidance is another pool, so the note of the refused one must not stay.
    assert main(words_of(place, "1")) == 0, capsys.readouterr().err
    assert len(list((out / "generated").glob("*.png"))) == 8  # two for each image that is made
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 < metrics["seconds"]["generate"] < metrics["seconds"]["total"]
    found = metrics["candidates"]
    assert (found["kind"], found["candidates"]) == ("generated", 8)
    config = json.loads((out / "config.json").read_text())
    assert config["generate_with"]["images"] == 8
    section = (out / "report.html").read_text().partition('id="candidates"')[2]
    assert "generated" in section.partition("</section>")[0]


@pytest.mark.needs("diffusers")
@pytest.mark.filterwarnings("ignore")
def test_python_call_generates_into_its_folder(tmp_path: Path) -> None:
    generation = gdfq.Generation(
        f"diffusers:{saved_pipeline(tmp_path / 'tiny', classes=CLASSES)}", tmp_path / "pool",
        [f"class {index}" for index in range(CLASSES)], guidance=1, denoising_steps=1,
    )  # fmt: skip
    quantized = gdfq.quantize(
        networks.make("Residual"), torch.zeros(1, *networks.SHAPE), "w4a4", "quick",
        generate_with=generation, images=4, iterations=1, steps=4,
    )  # fmt: skip
    assert quantized.metrics["candidates"]["candidates"] == 8
    assert len(list((tmp_path / "pool").glob("*.png"))) == 8


@pytest.mark.parametrize("name", ["data", "proxy"])
def test_test_images_that_the_run_uses_are_refused_before_a_network_is_loaded(name: str) -> None:
    for path in ("photos", Path("photos"), Path("photos").resolve()):
        with pytest.raises(UsageError, match=f"test and {name} are both photos"):
            gdfq.quantize("timm:absent", test=path, **{name: "photos"})  # type: ignore[arg-type]


def test_generation_is_refused_before_a_network_is_loaded(tmp_path: Path) -> None:
    generation = gdfq.Generation("diffusers:tiny", tmp_path, ["a", "b"])
    for options, said in (
        ({"proxy": tmp_path}, "both were given"),
        ({"recipe": "paper"}, "learns labels"),
        ({"recipe": "fast", "budget": "5m"}, "does not count the time of judging"),
    ):
        with pytest.raises(UsageError, match=said):
            gdfq.quantize("timm:absent", generate_with=generation, **options)
    with pytest.raises(UsageError, match=r"must be a gdfq.Generation; got 'diffusers:tiny'"):
        gdfq.quantize("timm:absent", generate_with="diffusers:tiny")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"each of the network's {CLASSES} classes needs a name"):
        gdfq.quantize(
            networks.make("Residual"), torch.zeros(1, *networks.SHAPE), generate_with=generation
        )
    assert not list(tmp_path.iterdir())
    for wrong in ({"guidance": -1.0}, {"batch": 0}, {"denoising_steps": -1}):
        with pytest.raises(UsageError, match="guidance must be at least 0"):
            gdfq.Generation("diffusers:tiny", tmp_path, **wrong)
