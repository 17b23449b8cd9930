"""Prompts, and pools of generated images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdfq.cli.generation import taken_from
from gdfq.data.folders import class_names_of
from gdfq.errors import UsageError
from gdfq.execution.progress import Step
from gdfq.generation.generation import Generation
from gdfq.generation.pipelines import Pipeline, Request, place_of
from gdfq.generation.pool import PoolSettings, make_pool
from gdfq.generation.prompts import Prompts

NAMES = ("cat", "dog", "ship")
SETTINGS = PoolSettings("diffusers:tiny", NAMES)


class Painter:
    """Paints the seed and the label of a request, and stops after some images."""

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.requests: list[Request] = []

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image]:
        self.requests += requests
        if len(self.requests) > self.most:
            raise KeyboardInterrupt
        return [Image.new("RGB", (4, 4), (r.seed % 256, r.label, 0)) for r in requests]


def test_prompts_cover_classes_and_templates_in_turn() -> None:
    prompts = Prompts(("a {}", "the {}"))
    texts = [prompts.text_of(index, NAMES) for index in range(7)]
    assert texts == ["a cat", "a dog", "a ship", "the cat", "the dog", "the ship", "a cat"]


def test_prompts_name_several_classes_in_other_pairs_each_round() -> None:
    prompts = Prompts(("a {}",), classes_per_prompt=2)
    assert [prompts.text_of(index, NAMES) for index in range(6)] == [
        *("a cat and a dog", "a dog and a ship", "a ship and a cat"),
        *("a cat and a ship", "a dog and a cat", "a ship and a dog"),
    ]
    assert Prompts(classes_per_prompt=5).classes_of(0, 2) == (0, 1)
    assert prompts.classes_of(6, 3) == (0,)  # a step of three classes leads to itself


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{} and {}",)])
def test_templates_need_one_place_for_the_class(templates: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="template must have one"):
        Prompts(templates)
    with pytest.raises(UsageError, match="at least one class"):
        Prompts(classes_per_prompt=0)


def test_stopped_pool_resumes_with_the_images_of_a_whole_one(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    make_pool(whole, SETTINGS, 7, Painter, batch=7)
    with pytest.raises(KeyboardInterrupt):
        make_pool(part, SETTINGS, 7, lambda: Painter(4), batch=2)
    painter, steps = Painter(), list[Step]()
    make_pool(part, SETTINGS, 7, lambda: painter, batch=2, listener=steps.append)
    assert len(painter.requests) == 3
    assert [(step.stage, step.index, step.total) for step in steps] == [
        ("diffusion", 6, 7), ("diffusion", 7, 7),
    ]  # fmt: skip
    names = sorted(path.name for path in whole.iterdir())
    assert names == [*(f"{index:06d}.png" for index in range(7)), "generated.json"]
    for name in names:
        assert (whole / name).read_bytes() == (part / name).read_bytes()
    assert len({request.seed for request in painter.requests}) == 3

    def load() -> Pipeline:
        raise AssertionError("nothing is missing")

    make_pool(part, SETTINGS, 7, load)
    with pytest.raises(UsageError, match="other settings"):
        make_pool(part, PoolSettings("diffusers:tiny", NAMES, seed=1), 7, load)


@pytest.mark.parametrize("text", ["", "{", '{"seed": 0', "[" * 1000, "\x00"])
def test_damaged_settings_of_a_pool_are_refused(tmp_path: Path, text: str) -> None:
    make_pool(tmp_path, SETTINGS, 2, Painter)
    (tmp_path / "generated.json").write_text(text)
    with pytest.raises(UsageError, match=r"generated\.json must be as gdfq wrote it"):
        make_pool(tmp_path, SETTINGS, 2, Painter)


@pytest.mark.parametrize("name", ["000000.png", "000005.png", "1000000.png"])
def test_images_that_no_pool_wrote_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    make_pool(tmp_path, SETTINGS, 1, Painter)
    assert (tmp_path / "000000.png").exists()
    (tmp_path / "other").mkdir()
    foreign = tmp_path / "other" / name
    foreign.write_bytes(b"a picture of mine")
    with pytest.raises(UsageError, match=f"holds {name} without it"):
        make_pool(tmp_path / "other", SETTINGS, 2, Painter)
    assert [path.name for path in foreign.parent.iterdir()] == [name]


def test_class_file_must_have_a_name_for_each_class(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\n\n dog\nship\n")
    assert class_names_of(file, 3) == (("cat",), ("dog",), ("ship",))
    with pytest.raises(UsageError, match="4 classes"):
        class_names_of(file, 4)
    with pytest.raises(UsageError, match="cannot be read"):
        class_names_of(tmp_path / "missing.txt", 3)


def test_options_of_generated_images_are_checked_first(tmp_path: Path) -> None:
    names = (
        "generate_with", "classes", "guidance", "denoising_steps", "classes_per_prompt",
        "generate_batch",
    )  # fmt: skip

    def of(**given: Any) -> Generation | None:
        return taken_from({**dict.fromkeys(names), **given}, tmp_path)

    model = "diffusers:some/model"
    assert of() is None
    assert of(generate_with=model) == Generation(model, tmp_path)
    chosen = Generation(model, tmp_path, guidance=0.0, batch=2)
    assert of(generate_with=model, guidance=0.0, generate_batch=2) == chosen
    with pytest.raises(UsageError, match="or remove --classes"):
        of(classes=tmp_path)
    with pytest.raises(UsageError, match="or remove --guidance, --generate-batch"):
        of(guidance=0.0, generate_batch=2)
    for name in ("some/model", "diffusers:", "timm:resnet18"):
        with pytest.raises(UsageError, match="diffusers:ID"):
            of(generate_with=name)
    assert place_of("diffusers:a:b") == "a:b"
