"""`gdfq quantize --proxy`: a run with images from elsewhere, its files and its report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import networks
from support.command_line import arguments
from support.small_runs import same, small, state

import gdfq
from gdfq.cli import main
from gdfq.cli.quantize import Outputs, config_of, quantize_into
from gdfq.errors import GdfqWarning, UsageError
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.context import Context
from gdfq.execution.progress import Step
from gdfq.graph.capture import capture
from gdfq.plan.resolve import resolve
from gdfq.recipes import QUICK
from gdfq.report import write_report
from gdfq.runs.folder import RunFolder
from gdfq.stages import identity_of


def striped(count: int) -> torch.Tensor:
    """Pixels [count, 3, 16, 16] that `networks.that_saw` some of knows."""
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(16) % 2 == 0).float()
    return (200 * torch.rand(count, 3, 16, 16, generator=draw) * mask).to(torch.uint8)


def photographs(folder: Path, pixels: torch.Tensor) -> Path:
    """Image files of pixels, of which the first and the eighth end behind their headers."""
    folder.mkdir()
    for index, image in enumerate(pixels):
        file = folder / f"{index:03d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        if index in {0, 7}:
            file.write_bytes(file.read_bytes()[:45])
    return folder


def test_run_with_proxies_says_what_was_kept_and_why(tmp_path: Path) -> None:
    pixels = striped(80)
    model = networks.that_saw(pixels[:40] / 255)
    teacher = capture(model, torch.zeros(1, 3, 16, 16))
    recipe = replace(small(QUICK).with_steps(5), name="small")
    plan = resolve(teacher, None, "w4a4", recipe, proxy=pixels[40:], mean=0.0, std=1.0)
    folder, context = RunFolder(tmp_path, 60), Context()
    config = config_of(plan, context) | {"proxy": "photographs"}
    quantized = quantize_into(folder, config, plan, context, Outputs(onnx=False))

    found = json.loads((tmp_path / "metrics.json").read_text())["candidates"]
    assert found["candidates"] == 40
    assert found["refused"] is None
    assert 0 < found["kept"] <= 24  # as many as the recipe makes, at most
    assert found["share"] == round(found["kept"] / (found["kept"] + 24), 4)
    assert found["distances"]["kept"] < found["distances"]["noise"]
    card = gdfq.load(tmp_path).card
    assert card.candidates == quantized.card.candidates
    assert f"of 40 proxy images, which were all judged, {found['kept']} passed" in str(
        card.candidates
    )
    page = write_report(tmp_path).read_text()
    section = page.partition('id="candidates"')[2].partition("</section>")[0]
    assert section.count("<img") >= found["kept"] or section.count("<img") >= 16
    assert "Passed the filters" in section
    assert str(card.candidates) in section

    other = resolve(teacher, None, "w4a4", recipe, proxy=pixels[41:], mean=0.0, std=1.0)
    none = resolve(teacher, None, "w4a4", recipe, mean=0.0, std=1.0)
    identities = [identity_of(p, context)["candidates"] for p in (plan, other, none)]
    assert len(set(map(str, identities))) == 3


def test_damaged_photographs_are_left_out_of_a_run(tmp_path: Path) -> None:
    pixels = striped(80)
    teacher = capture(networks.that_saw(pixels[:40] / 255), torch.zeros(1, 3, 16, 16))
    proxy = photographs(tmp_path / "photographs", pixels[40:])
    recipe = replace(small(QUICK).with_steps(5), name="small")
    plan = resolve(teacher, None, "w4a4", recipe, proxy=proxy, mean=0.0, std=1.0)
    folder, context = RunFolder(tmp_path / "run", 60), Context()
    config = config_of(plan, context) | {"proxy": "photographs"}
    with pytest.warns(GdfqWarning, match=r"2 cannot be decoded and are left out, such as .*\.png"):
        quantize_into(folder, config, plan, context, Outputs(onnx=False))
    found = json.loads((folder.path / "metrics.json").read_text())["candidates"]
    assert found["kept"] > 0
    assert found["dropped"]["unreadable"] == 2
    page = write_report(folder.path).read_text()
    section = page.partition('id="candidates"')[2].partition("</section>")[0]
    assert "2 because they cannot be decoded (unreadable)" in section
    assert "Passed the filters" in section
    for name in ("data", "test"):  # real images are complete
        with pytest.raises(UsageError, match=r"000\.png is not"):
            resolve(teacher, None, "w4a4", recipe, mean=0.0, std=1.0, **{name: proxy})  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_run_with_proxies_resumes(tmp_path: Path, given: bool) -> None:
    """Beside given images, and with photographs of which some are damaged."""
    pixels = striped(80)
    teacher = capture(networks.that_saw(pixels[:40] / 255), torch.zeros(1, 3, 16, 16))
    options: dict[str, Any] = {"data": pixels[:10], "proxy": pixels[40:]}
    if not given:
        options = {"proxy": photographs(tmp_path / "photographs", pixels[40:])}

    def quantized(checkpoints: Checkpoints | None, stop: str | None) -> gdfq.QuantizedNetwork:
        def listen(step: Step) -> None:
            if (step.stage, step.index) == (stop, 3):
                raise InterruptedError

        return gdfq.quantize(
            teacher, None, "w4a4", small(QUICK).with_steps(5), mean=0.0, std=1.0,
            checkpoints=checkpoints, listener=listen, **options,
        )  # fmt: skip

    whole = quantized(None, None)
    with pytest.raises(InterruptedError):
        quantized(Checkpoints(tmp_path / "run"), "tune")
    resumed = quantized(Checkpoints(tmp_path / "run"), None)
    assert same(state(resumed.network), state(whole.network))
    found = resumed.metrics["candidates"]
    assert found == whole.metrics["candidates"]
    assert found["own"] == (10 if given else 24)
    assert 0 < found["kept"] <= 24


def test_folder_without_images_is_refused_before_the_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "photographs").mkdir()
    words = arguments(place, "--proxy", f"{place}/photographs")
    words[words.index("paper")] = "quick"
    assert main(words) == 2
    assert "holds none" in capsys.readouterr().err
    words[words.index("quick")] = "paper"
    assert main(words) == 2
    assert "recipe 'paper' learns labels" in capsys.readouterr().err
