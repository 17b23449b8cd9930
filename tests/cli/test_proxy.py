"""`gdfq quantize --proxy`: a run with images from elsewhere, its files and its report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import networks
from support.command_line import arguments
from support.small_runs import small

import gdfq
from gdfq.cli import main
from gdfq.cli.quantize import Outputs, config_of, quantize_into
from gdfq.execution.context import Context
from gdfq.graph.capture import capture
from gdfq.plan.resolve import resolve
from gdfq.recipes import QUICK
from gdfq.report import write_report
from gdfq.runs.folder import RunFolder
from gdfq.stages import identity_of


def test_run_with_proxies_says_what_was_kept_and_why(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(16) % 2 == 0).float()
    pixels = (200 * torch.rand(80, 3, 16, 16, generator=draw) * mask).to(torch.uint8)
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
