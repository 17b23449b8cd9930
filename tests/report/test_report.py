"""The report of a run, complete or damaged, and the comparison of runs."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.narrowing import instance, present

import gdfq
from gdfq.cli import main
from gdfq.errors import UsageError
from gdfq.report import figures
from gdfq.report.compare import Row, _page, compare, quality, side_by_side
from gdfq.report.drop import drop_of
from gdfq.report.fingerprints import ImageFingerprints
from gdfq.report.pictures import data_uri, histogram_path, place
from gdfq.report.read import Run, read_run
from gdfq.report.sections import Content, training
from gdfq.report.sections import test as sections_test
from gdfq.report.sensitive_layers import sensitive_layers
from gdfq.report.source_warnings import (
    collapse,
    no_better_than_noise,
    not_converging,
    saturated,
    source_warnings,
    uncovered,
)
from gdfq.report.verdict import verdict
from gdfq.report.wording import faster, lost_or_gained, size_words
from gdfq.runs.names import CONFIG, METRICS

TITLES = (
    "Expected accuracy drop",
    "Images",
    "Images from elsewhere",
    "Layers",
    "Training",
    "Test images",
    "Reproducing the run",
)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def made(**parts: Any) -> Run:
    """A run of the given parts."""
    empty: dict[str, Any] = {
        "config": {},
        "metrics": {},
        "history": (),
        "evidence": {},
        "arrays": {},
    }
    sizes, problems = parts.pop("sizes", {"student.onnx": 250_000}), parts.pop("problems", {})
    return Run(Path("a run"), **{**empty, **parts}, sizes=sizes, problems=problems)


def measured(before: float, after: float, images: int = 10_000, **more: Any) -> dict[str, Any]:
    accuracy = {"teacher": {"top1": before}, "student": {"top1": after}, "test_images": images}
    return {"metrics": {"float_bytes": 1_000_000, **accuracy, **more}}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take the time."""
    monkeypatch.setattr("gdfq.report.page.svg", lambda _: "<svg></svg>")
    monkeypatch.setattr("gdfq.report.page.png", lambda _: b"")


class Text(HTMLParser):
    """The text of a page, its tags, and whether they close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "br"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in {"style", "script"}:
            self.words.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> Text:
    return Text(gdfq.write_report(folder).read_text())


# Warnings


def test_collapse_warns_of_images_that_are_alike() -> None:
    fine = {"pixels": 0.9, "features": 2.0, "within_class": 0.6}
    assert collapse(fine) is None
    assert collapse({**fine, "within_class": None}) is None
    assert "all images are alike" in present(collapse({**fine, "pixels": 0.05}))
    assert "images of a class are alike" in present(collapse({**fine, "within_class": 0.01}))


def test_saturated_warns_of_most_pixels_out_of_range() -> None:
    assert saturated(20) is None
    assert "80 % of the pixels" in present(saturated(80))


def test_uncovered_warns_of_missing_classes() -> None:
    assert uncovered(None) is None
    assert uncovered({"predicted": 8, "possible": 10}) is None
    assert "only 3 of 10 possible classes" in present(uncovered({"predicted": 3, "possible": 10}))


def test_no_better_than_noise_warns_of_statistics_like_noise() -> None:
    def of(*synthetic: float) -> list[dict[str, float]]:
        return [{"synthetic": s, "white": 5.0, "natural": 1.0} for s in synthetic]

    assert no_better_than_noise([], "why.") is None
    assert no_better_than_noise(of(0.1, 0.2), "why.") is None
    assert present(no_better_than_noise(of(1.0, 0.9), "why.")).endswith("of noise (1): why.")


@pytest.mark.parametrize(
    ("config", "history", "advice"),
    [
        ({}, (), "Give it more iterations (--iterations)."),
        ({}, ({"stage": "tune", "step": 1, "generator": 1.0},), "Give it more steps (--steps)."),
        ({"data": "photos"}, (), "or give other images."),
    ],
)
def test_warnings_advise_what_the_images_of_the_run_allow(
    config: dict[str, str], history: tuple[dict[str, Any], ...], advice: str
) -> None:
    images = {
        "diversity": {"pixels": 0.01},
        "clipped": 0.0,
        "classes": None,
        "distances": [{"synthetic": 0.7, "white": 0.1, "natural": 0.2}],
    }
    alike, like_noise = source_warnings(
        made(config=config, history=history, evidence={"images": images})
    )
    assert like_noise.endswith(advice)
    assert alike.endswith("Give images that differ." if config else "recipe fast.")


def test_not_converging_warns_of_a_constant_loss() -> None:
    assert not_converging([]) is None
    assert not_converging([3.0] * 9) is None  # too few steps
    assert not_converging([10 - i / 10 for i in range(50)]) is None
    assert "does not converge" in present(not_converging([3.0] * 50))
    # One lucky step at the end does not make it converge.
    assert "does not converge" in present(not_converging([2.0] * 199 + [0.1]))
    history = [{"stage": "tune", "step": i, "generator": 1.0} for i in range(20)]
    assert len(source_warnings(made(history=history))) == 1


# The verdict


@pytest.mark.parametrize(
    ("after", "level"), [(91.5, "good"), (91.09, "good"), (90.0, "fair"), (80.0, "poor")]
)
def test_level_is_that_of_the_measured_drop(after: float, level: str) -> None:
    assert verdict(made(**measured(92.0, after))).level == level


def test_level_of_few_test_images_is_unknown() -> None:
    found = verdict(made(**measured(90.0, 90.0, images=40)))
    assert found.level == "unknown"
    assert found.sentence.startswith("The test images are too few to judge the accuracy: ")
    assert any("more labelled images" in line for line in found.advice)


def test_verdict_gives_its_evidence() -> None:
    found = verdict(made(**measured(90.0, 88.0), evidence={"test": {"error": 0.25}}))
    assert found.sentence == (
        "The accuracy is somewhat lower: 244 KiB, 4.0 times smaller, 2.00 points lost "
        "(90.00 % before, 88.00 % after)."
    )
    assert "between 1.51 and 2.49 points (95 % interval)" in " ".join(found.evidence)
    assert any("250,000 bytes" in line for line in found.evidence)


def test_drop_of_accuracies_alone_has_the_unpaired_error() -> None:
    drop = drop_of(made(**measured(90.0, 90.0, images=100)))
    share = 91 / 102
    assert present(drop).high == pytest.approx(1.96 * 100 * (2 * share * (1 - share) / 102) ** 0.5)


def test_interval_of_few_correct_images_is_not_empty() -> None:
    run = made(**measured(100.0, 100.0, images=4))
    assert present(drop_of(run)).high == pytest.approx(1.96 * 100 * (2 * 5 / 6 * 1 / 6 / 6) ** 0.5)
    assert verdict(run).level == "unknown"


def test_level_of_an_expected_drop_is_that_of_its_upper_end() -> None:
    trust = {"expected_drop": 0.5, "interval": [0.1, 3.0], "agreement": 97.0, "images": 512}
    found = verdict(made(evidence={"trust": trust}))
    assert found.level == "fair"
    assert found.sentence == (
        "The accuracy is probably somewhat lower: 244 KiB, expected accuracy drop about 0.5 points."
    )
    evidence = " ".join(found.evidence)
    assert "between 0.1 and 3.0 points. This interval held for nine in ten" in evidence
    assert "mixtures of images are difficult by design" in evidence


@pytest.mark.parametrize(
    ("interval", "level", "words"),
    [
        ([0.0, 0.9], "good", "The accuracy is probably close to the original's"),
        ([0.9, 5.1], "unknown", "The accuracy is not known"),
        ([1.1, 5.1], "poor", "The accuracy may be much lower"),
    ],
)
def test_verdict_on_an_estimate_depends_on_both_ends(
    interval: list[float], level: str, words: list[str]
) -> None:
    trust = {"expected_drop": sum(interval) / 2, "interval": interval, "agreement": 97.0}
    found = verdict(made(evidence={"trust": trust}))
    assert found.level == level
    assert found.sentence.startswith(f"{words}: ")


def test_level_of_a_wide_measured_interval_is_unknown() -> None:
    assert verdict(made(**measured(90.0, 86.0, images=100))).level == "unknown"


def test_verdict_without_estimate_gives_the_reason() -> None:
    trust = {
        "expected_drop": None,
        "interval": None,
        "agreement": 97.0,
        "reason": "Too few images.",
    }
    found = verdict(made(evidence={"trust": trust}))
    assert found.level == "unknown"
    assert "the accuracy drop could not be estimated" in found.sentence
    assert any("no estimate. Too few images." in line for line in found.evidence)
    assert (
        "Measure the accuracy on labelled images: gdfq evaluate a run --test DATA." in found.advice
    )
    untried = verdict(made())
    assert untried.level == "unknown"
    assert "the accuracy drop was not estimated" in untried.sentence


def test_verdict_on_outputs_without_classes_gives_their_error() -> None:
    found = verdict(made(metrics={"student": {"error_percent": {"boxes": 3.2, "scores": 1.0}}}))
    assert "relative error of the outputs at most 3.2 % (boxes)" in found.sentence
    assert not any("labelled images" in line for line in found.advice)
    trust = {"agreement": None, "relative_error": 2.5, "images": 64, "source": "noise"}
    found = verdict(made(evidence={"trust": trust}))
    assert "Outputs: their relative error is 2.5 % on 64 held-out inputs (noise)." in found.evidence
    assert not any("same class" in line for line in found.evidence)
    assert not any("labelled images" in line for line in found.advice)


def test_advice_names_options_that_help() -> None:
    layers = [
        {"name": "stem", "sensitivity": 8.0, "bits": 4, "weights": 4096},
        {"name": "head", "sensitivity": 2.0, "bits": 8, "weights": 512},
        *({"name": f"l{i}", "sensitivity": 0.1, "bits": 4, "weights": 99} for i in range(20)),
    ]
    config = {"bits": "w4a4", "recipe": {"name": "quick"}}
    run = made(**measured(90.0, 70.0), config=config, evidence={"layers": {"layers": layers}})
    advice = verdict(run, ("A warning.",)).advice
    assert advice[0] == "A warning."
    assert (
        "--layer-bits 'stem=8' gives more bits to a layer with 67 % of the total sensitivity"
        in advice[1]
    )
    assert "adds 2.0 KiB" in advice[1]
    assert "--layer-bits 'head=float'" in advice[2]
    assert "w4a8" in advice[3]
    assert "--recipe fast" in advice[4]
    found = {"layers": {"layers": layers, "sensitivity": "error"}}
    first = verdict(made(**measured(90.0, 70.0), evidence=found)).advice[0]
    assert "67 % of the sum of all layers' own errors" in first


@pytest.mark.parametrize(
    ("bits", "steps", "said"), [("w4a4", 0, 1), ("w4a4", 9, 0), ("w4a8", 0, 0)]
)
def test_advice_for_a_run_that_had_no_time_to_tune_is_more_time(
    bits: str, steps: int, said: int
) -> None:
    config = {"bits": bits, "recipe": {"name": "fast"}}
    run = made(**measured(90.0, 70.0, effort={"steps": steps}), config=config)
    assert sum("--budget" in line for line in verdict(run).advice) == said


def test_speed_can_be_measured_where_a_file_was_exported() -> None:
    def says_how(**export: str) -> bool:
        found = verdict(made(**measured(90.0, 89.9, export=export)))
        return any("Measure it with gdfq bench a run" in line for line in found.evidence)

    assert says_how(target="onnx")
    assert says_how(path="student.onnx")  # of a version that had no targets
    assert not says_how()


def test_advice_for_a_good_run_is_to_deploy_it_unless_there_are_warnings() -> None:
    run = made(**measured(90.0, 89.9, export={"target": "onnx"}))
    assert verdict(run).advice == ("Nothing needs to be done. Deploy the file.",)
    assert verdict(run, ("A warning.",)).advice == ("A warning.",)
    without_file = made(**measured(90.0, 89.9), sizes={"student.safetensors": 300_000})
    assert verdict(without_file).advice == (
        "Nothing needs to be done. To deploy it: gdfq export a run.",
    )


@pytest.mark.parametrize(
    ("bits", "is_advised"), [("w4a8", False), ("w3a8", True), ("4.5 bits", True)]
)
def test_fast_is_advised_where_it_does_more_than_quick(bits: str, is_advised: bool) -> None:
    config = {"bits": bits, "recipe": {"name": "quick"}}
    advice = verdict(made(**measured(90.0, 70.0), config=config)).advice
    assert any("--recipe fast" in line for line in advice) is is_advised


def test_sensitive_layers_are_none_where_all_are_equal() -> None:
    same = [{"name": f"l{i}", "sensitivity": 1.0, "bits": 4, "weights": 9} for i in range(5)]
    assert sensitive_layers(same) == ()
    assert sensitive_layers([]) == ()
    assert sensitive_layers([{"name": "a", "sensitivity": None, "bits": None, "weights": 9}]) == ()


def test_option_escapes_names_that_are_patterns() -> None:
    rows = [{"name": "first", "sensitivity": 9.0, "bits": 4, "weights": 8}]
    rows += [{"name": f"l{i}", "sensitivity": 0.1, "bits": 4, "weights": 8} for i in range(5)]
    assert sensitive_layers(rows)[0].option == "--layer-bits '[f]irst=8'"


def test_faster_is_for_one_image_on_one_thread() -> None:
    def timing(batch: int, median: float) -> dict[str, float]:
        return {"batch": batch, "threads": 1, "median": median}

    timings = [timing(1, 3.0), timing(1, 2.0), timing(32, 9.0), timing(32, 1.0)]
    assert faster({"bench": timings}, "student.onnx") == 1.5  # of a version that timed it alone
    assert faster({"bench": timings}, "student.tflite") is None
    assert faster({}, "student.onnx") is None
    assert "1.5 times as fast" in verdict(made(metrics={"bench": timings})).sentence


def test_faster_is_of_the_file_of_the_run() -> None:
    def timing(file: str, median: float) -> dict[str, Any]:
        return {"file": file, "runtime": "R", "batch": 1, "threads": 1, "median": median}

    rows = [("full precision", 8.0), ("student.onnx", 4.0), ("full precision", 6.0)]
    bench = [timing(*row) for row in (*rows, ("student.tflite", 2.0))]
    assert faster({"bench": bench}, "student.tflite") == 4
    assert faster({"bench": bench}, "student.onnx") == 2
    assert faster({"bench": bench}, "student.pt2") is None


def test_verdict_says_gained_and_slower() -> None:
    bench = [{"batch": 1, "threads": 1, "median": median} for median in (1.0, 1.4)]
    sentence = verdict(made(**measured(90.0, 90.56, bench=bench))).sentence
    assert "1.4 times slower, 0.56 points gained (90.00 % before, 90.56 % after)" in sentence


def test_size_words_have_units() -> None:
    assert [size_words(n) for n in (1434, 10 * 1024, 10 * 2**20, 3 * 2**30)] == [
        "1.4 KiB",
        "10 KiB",
        "10.0 MiB",
        "3.0 GiB",
    ]


# Figures


def test_svg_has_the_colour_of_the_text() -> None:
    picture = figures.svg(present(figures.stages({"tune": 3.0, "total": 9.0})))
    assert picture.startswith("<svg")
    assert "currentColor" in picture
    assert figures._INK not in picture
    assert 'id="figure' not in picture
    assert ">tune</text>" in picture  # text that can be found
    assert picture == figures.svg(present(figures.stages({"tune": 3.0, "total": 9.0})))


def test_figures_of_no_values_are_none() -> None:
    assert figures.losses([], "tune") is None
    assert figures.losses([{"stage": "tune", "step": 1, "kd": 1.0}], "tune") is None
    assert figures.rates([]) is figures.ranges([], "tune") is figures.stages({}) is None
    assert figures.distances([]) is figures.signal([]) is figures.class_changes([]) is None
    assert figures.sensitivities([{"name": "a", "sensitivity": None}], "divergence") is None
    assert figures.pareto([], "top-1") is figures.pareto([("a", 1.0, 9.0)], "top-1") is None


def test_pareto_axis_ends_at_100_percent() -> None:
    figure = figures.pareto([("a", 1.0, 100.0), ("b", 2.0, 90.0)], "top-1, %")
    assert present(figure).axes[0].get_ylim()[1] == 100


def test_figures_do_not_read_names_as_formulas() -> None:
    picture = figures.svg(
        present(figures.sensitivities([{"name": "a$b^2$<i>", "sensitivity": 1.0}], "divergence"))
    )
    assert "a$b^2$&lt;i&gt;" in picture


def test_frontier_is_what_no_other_point_dominates() -> None:
    points = [("a", 10, 90), ("b", 20, 89), ("c", 20, 91), ("d", 5, 70), ("e", 10, 80)]
    assert [name for name, *_ in figures.frontier(points)] == ["d", "a", "c"]


def test_histogram_path_fills_its_box() -> None:
    path = histogram_path([0, 4, 1])
    assert path == "M0 24V24.0h32.00V0.0h32.00V12.0h32.00V24z"
    assert histogram_path([0, 0]).startswith("M0 24V24.0")
    assert [place(x, (0, 4)) for x in (-1, 0, 1, 9)] == [0, 0, 24, 96]
    assert place(1, (1, 1)) == 48


def test_data_uri_is_a_png() -> None:
    assert data_uri(np.zeros((1, 2, 2), np.uint8)).startswith("data:image/png;base64,")
    assert data_uri(np.zeros((3, 2, 2), np.uint8)).startswith("data:image/png;base64,")


# The page


def test_report_of_a_complete_run_shows_all_sections(run: Path, finished: Path) -> None:
    page = page_of(run)
    text = str(page)
    assert all(title in text for title in TITLES)
    for text_part in ("times smaller", "conv2", "expected calibration error", "class 0", "relu"):
        assert text_part in text
    assert json.loads((run / "config.json").read_text())["weights_sha256"] in text
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) > 15
    drawn = {path.name for path in (run / "report").iterdir()}
    assert {
        "losses-tune.svg",
        "losses-tune.png",
        "rate.svg",
        "sensitivity.png",
        "reliability.svg",
    } <= drawn
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["verdict"]["level"] in {"fair", "poor", "unknown"}  # of 40 test images
    assert numbers["evidence"]["layers"]["layers"][0]["name"] == "conv1"
    assert (finished / "report.html").exists()  # quantize has written one


def test_page_refers_to_no_other_file(run: Path) -> None:
    page = page_of(run)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            address = attributes.get(name)
            if address is not None:
                assert address.startswith(("data:", "#")), (tag, address)
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_report_is_deterministic(run: Path) -> None:
    first = gdfq.write_report(run).read_bytes()
    assert gdfq.write_report(run).read_bytes() == first


def test_page_escapes_names(run: Path, undrawn: None) -> None:
    config = json.loads((run / "config.json").read_text())
    evil = "<script>alert(1)</script>"
    (run / "config.json").write_text(json.dumps({**config, "model": evil, "command": evil}))
    evidence = json.loads((run / "evidence.json").read_text())
    evidence["layers"]["layers"][0]["name"] = evil
    (run / "evidence.json").write_text(json.dumps(evidence))
    page = page_of(run)
    assert str(page).count(evil) >= 3
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1


def test_page_of_a_run_without_test_data(run: Path, undrawn: None) -> None:
    evidence = json.loads((run / "evidence.json").read_text())
    del evidence["test"]
    (run / "evidence.json").write_text(json.dumps(evidence))
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["teacher"], metrics["student"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    text = str(page_of(run))
    assert "No labelled test images were given" in text
    assert "The accuracy is not known" in text
    assert "conv2" in text


def test_page_shows_an_estimate_with_its_interval(run: Path, undrawn: None) -> None:
    evidence = json.loads((run / "evidence.json").read_text())
    evidence["trust"] = {
        "agreement": 96.5, "kl": 0.04, "images": 512, "source": "spectral", "relative_error": 9.5,
        "expected_drop": 1.5, "interval": [0.5, 2.5], "reason": "",
    }  # fmt: skip
    (run / "evidence.json").write_text(json.dumps(evidence))
    assert "The expected accuracy drop is about 1.5 points (between 0.5 and 2.5)" in str(
        page_of(run)
    )
    evidence["trust"] |= {"expected_drop": None, "interval": None, "reason": "Too far from others."}
    (run / "evidence.json").write_text(json.dumps(evidence))
    assert "There is no estimate of the accuracy drop. Too far from others." in str(page_of(run))


# Bad input


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("config.json", "the options of the run are not known"),
        ("metrics.json", "the run has not finished"),
        ("history.jsonl", "the losses by step are not known"),
        ("evidence.json", "no evidence was measured"),
        ("evidence.npz", "no evidence was measured"),
        ("student.onnx", "student.safetensors has"),
    ],
)
def test_page_names_a_missing_file_and_shows_the_rest(
    run: Path, undrawn: None, name: str, problem: str
) -> None:
    (run / name).unlink()
    text = str(page_of(run))
    assert problem in text
    assert all(title in text for title in TITLES)
    assert "Losses of stage" in text or name == "history.jsonl"


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.json", "history.jsonl", "evidence.json", "evidence.npz"]
)
@pytest.mark.parametrize("content", [b"", b"\x00\xff garbage", b'[1, 2]\n{"a": 1}\n', b"{}"])
def test_page_names_a_damaged_file_and_shows_the_rest(
    run: Path, undrawn: None, name: str, content: bytes
) -> None:
    (run / name).write_bytes(content)
    text = str(page_of(run))
    assert all(title in text for title in TITLES)
    if content.startswith(b"\x00"):
        assert f"{name} is damaged or was modified" in text


@pytest.mark.parametrize("section", ["layers", "images", "test"])
def test_page_names_unexpected_values_and_shows_the_rest(
    run: Path, undrawn: None, section: str
) -> None:
    evidence = json.loads((run / "evidence.json").read_text())
    evidence[section] = {"surprise": [1, 2, 3]}
    (run / "evidence.json").write_text(json.dumps(evidence))
    text = str(page_of(run))
    assert "values that no run writes" in text
    assert all(title in text for title in TITLES)
    assert "SHA-256 of the weights" in text


def test_evidence_of_version_1_is_read(run: Path, undrawn: None) -> None:
    """Its old keys, at all depths, give the same values and the same page."""
    path = run / "evidence.json"
    new, page = read_run(run).evidence, str(page_of(run))
    old_names = {
        "layers": {"sensitivity": "harm", "minimum": "least", "maximum": "greatest"},
        "images": {"predicted": "answered", "as_labelled": "as_meant"},
        "test": {"gained": "won", "still_wrong": "moved", "prediction": "answer"},
    }
    old = {"version": 1, **{k: v for k, v in new.items() if k != "version"}}
    for section, names in old_names.items():
        text = json.dumps(old[section])
        for name, old_name in names.items():
            assert f'"{name}": ' in text or name == "prediction"  # there may be no confusion
            text = text.replace(f'"{name}": ', f'"{old_name}": ')
        old[section] = json.loads(text)
    path.write_text(json.dumps(old))
    assert read_run(run).evidence == {**new, "version": 1}
    assert str(page_of(run)) == page


def test_learning_rates_of_version_0_1_are_shown() -> None:
    """Its optimizer of codes and grids named the rates codes, steps, others and roundings."""
    names = {"codes": 1e-2, "steps": 1e-3, "others": 1e-4, "roundings": 0.0}
    run = made(
        config={"recipe": {"tuning": {"optimizer": names}}}, metrics={"seconds": {"tune": 1}}
    )
    assert instance(training(run), Content).values["rates"] == [
        ("code_lr", 1e-2),
        ("scale_lr", 1e-3),
        ("other_lr", 1e-4),
    ]
    current = {"code_lr": 1e-2, "scale_lr": 1e-3, "other_lr": 0.0, "rounding_lr": 1e-4}
    run = made(
        config={"recipe": {"tuning": {"optimizer": current}}}, metrics={"seconds": {"tune": 1}}
    )
    assert instance(training(run), Content).values["rates"] == [
        ("code_lr", 1e-2),
        ("scale_lr", 1e-3),
        ("rounding_lr", 1e-4),
    ]


def test_page_names_a_newer_version(run: Path, undrawn: None) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "gdfq": "99.1"}))
    assert "made by gdfq 99.1, which is newer" in str(page_of(run))
    evidence = json.loads((run / "evidence.json").read_text())
    (run / "evidence.json").write_text(json.dumps({**evidence, "version": 99}))
    assert "it has version 99; versions 1 to 2 can be read" in str(page_of(run))


def test_history_leaves_out_an_incomplete_last_line(run: Path) -> None:
    path = run / "history.jsonl"
    whole = read_run(run).history
    path.write_bytes(path.read_bytes()[:-9])
    assert read_run(run).history == whole[:-1]


def test_report_of_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="a report needs a run folder"):
        gdfq.write_report(tmp_path)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "Give a folder that gdfq quantize wrote" in capsys.readouterr().err


def test_page_of_a_hundred_layers_is_small(run: Path) -> None:
    """The page of a deep network stays small: histograms are bins."""
    evidence = json.loads((run / "evidence.json").read_text())
    layers = evidence["layers"]
    with np.load(run / "evidence.npz") as file:
        arrays = dict(file)
    for key, prefix in (("layers", "weight"), ("activations", "activation")):
        layers[key] = [
            {
                **layers[key][0],
                "name": f"stage{i}.block{i}.conv",
                "activation": f"stage{i}.block{i}.conv",
            }
            for i in range(100)
        ]
        for kind in ("counts", "ends"):
            name = f"layers.{prefix}_{kind}"
            arrays[name] = np.repeat(arrays[name][:1], 100, 0)
    (run / "evidence.json").write_text(json.dumps(evidence))
    np.savez(run / "evidence.npz", **arrays)
    assert gdfq.write_report(run).stat().st_size < 2**20


# Comparison


def row(name: str, **more: Any) -> Row:
    empty: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__)
    usual = {"network": "n", "bits": "w4a4", "expected": "–", "test": ImageFingerprints("t")}
    return Row(**{**empty, **usual, "name": name, **more})


def test_comparison_separates_runs_of_other_networks() -> None:
    rows = [row("a"), row("other", network="x" * 64), row("b")]
    found = side_by_side(rows)
    assert [r.name for r in found.rows] == ["a", "b"]
    assert [r.name for r in found.apart] == ["other"]
    assert "other is not compared: it is of another network" in found.notes[0]


def test_comparison_leaves_out_accuracies_on_other_images() -> None:
    rows = [
        row(n, accuracy=90.0, drop=1.0, test=ImageFingerprints(t))
        for n, t in (("c", "u"), ("a", "t"), ("b", "t"), ("d", None))
    ]
    found = side_by_side([*rows, row("untested", test=ImageFingerprints())])
    assert [r.accuracy for r in found.rows] == [None, 90.0, 90.0, None, None]
    assert [r.drop for r in found.rows] == [None, 1.0, 1.0, None, None]
    assert found.notes[0] == (
        "the accuracy of c is not compared: it was tested on other images than a."
    )
    unknown = "it is not known whether it was tested on the same images as a"
    assert f"the accuracy of d is not compared: {unknown}" in found.notes[1]
    assert len(found.notes) == 2


def test_accuracy_of_a_single_run_is_shown_whatever_is_known_of_its_images() -> None:
    (only,) = side_by_side([row("a", accuracy=90.0, test=ImageFingerprints())]).rows
    assert only.accuracy == 90.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"data": "t"}, {"data": "t"}, True),
        ({"data": "t"}, {"data": "u"}, False),
        ({"data": "t"}, {"predictions": "t"}, None),
        ({}, {}, None),
        # A run of today beside one of an earlier version, both with a report.
        ({"data": "t", "predictions": "p"}, {"predictions": "p"}, True),
        ({"data": "t", "predictions": "p"}, {"predictions": "q"}, False),
        # Pixels are surer than predictions, which another processor can round to other classes.
        ({"data": "t", "predictions": "p"}, {"data": "t", "predictions": "q"}, True),
        ({"data": "t", "predictions": "p"}, {"data": "u", "predictions": "p"}, False),
        # A copy of a file is the same under another path; another file can have the same path.
        ({"data": "t", "file": ("a.npz", 9, 80.0)}, {"data": "t", "file": ("b.npz", 9, 80.0)}, True),
        ({"data": "t", "file": ("a.npz", 9, 80.0)}, {"data": "u", "file": ("a.npz", 9, 80.0)}, False),
        # Runs of earlier versions, one of them without a report.
        ({"predictions": "p", "file": ("a.npz", 9, 80.0)}, {"file": ("a.npz", 9, 80.0)}, True),
        ({"predictions": "p", "file": ("a.npz", 9, 80.0)}, {"file": ("b.npz", 9, 80.0)}, None),
        ({"file": ("a.npz", 9, 80.0)}, {"file": ("a.npz", 8, 80.0)}, None),
        ({"file": ("a.npz", 9, 80.0)}, {"file": ("a.npz", 9, 70.0)}, None),
    ],
)  # fmt: skip
def test_images_are_the_same_by_the_surest_fingerprint_that_both_runs_have(
    one: dict[str, Any], other: dict[str, Any], same: bool | None
) -> None:
    a, b = ImageFingerprints(**one), ImageFingerprints(**other)
    assert (a.same_as(b), b.same_as(a)) == (same, same)


def test_run_without_report_is_compared_with_one_that_has_it(
    finished: Path, tmp_path: Path
) -> None:
    """They are known by their images, not by the path: one run reads a copy of the test file."""
    place, out = finished.parent, tmp_path / "unreported"
    shutil.copy(place / "test.npz", tmp_path / "copy.npz")
    words = ["quantize", f"{place}/net.py:factory", "--weights", f"{place}/w.safetensors"]
    words += ["--input", "3x8x8", "--mean", ".5,.5,.5", "--std", ".3,.3,.3", "--recipe", "round"]
    words += ["--steps", "1", "--no-report", "--no-onnx", "--test", f"{tmp_path}/copy.npz"]
    assert main([*words, "--out", str(out)]) == 0
    found = compare([finished, out], tmp_path / "c.html")
    expected = [
        json.loads((folder / METRICS).read_text())["student"]["top1"] for folder in (finished, out)
    ]
    assert [row.accuracy for row in found.rows] == expected
    assert not any("accuracy" in note for note in found.notes if "is not compared" in note)


def test_metrics_have_a_hash_of_labels_and_of_every_third_of_40_images(finished: Path) -> None:
    """At most 16 images are hashed."""
    with np.load(finished.parent / "test.npz") as file:
        content = file["images"][::3].tobytes() + file["labels"].astype(np.int64).tobytes()
    found = json.loads((finished / METRICS).read_text())["test_data"]
    assert found == f"40 images, {hashlib.sha256(content).hexdigest()[:16]}"


def test_runs_of_earlier_versions_are_compared_by_predictions_or_path(
    run: Path, undrawn: None, tmp_path: Path
) -> None:
    metrics = json.loads((run / METRICS).read_text())
    del metrics["test_data"]
    (run / METRICS).write_text(json.dumps(metrics))
    unreported = Path(shutil.copytree(run, tmp_path / "unreported"))
    (unreported / "evidence.json").unlink()
    other = Path(shutil.copytree(unreported, tmp_path / "other"))
    config = json.loads((run / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps({**config, "test": "elsewhere.npz"}))
    found = compare([run, unreported, other], tmp_path / "c.html")
    top1 = metrics["student"]["top1"]
    assert [row.accuracy for row in found.rows] == [top1, top1, None]
    said = "the accuracy of other is not compared: it is not known whether it was tested on the"
    assert any(said in note for note in found.notes)


def test_quality_is_agreement_where_no_run_was_tested() -> None:
    rows = [row("a", bytes=10, agreement=97.0), row("b", agreement=99.0)]
    words, points = quality(rows)
    assert words == "agreement with the original, %"
    assert points == [("a", 10.0, 97.0)]
    words, points = quality([row("a", bytes=10, accuracy=90.0), *rows])
    assert (words, points) == ("top-1, %", [("a", 10.0, 90.0)])


def test_compare_names_folders_that_it_cannot_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "deep" / "run"
    shutil.copytree(run, other)
    (other / "metrics.json").unlink()
    page = tmp_path / "c.html"
    words = ["compare", str(run), str(other), str(tmp_path / "nowhere"), "--out", str(page)]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the run has not finished" in printed
    assert "nowhere is not one" in printed
    text = str(Text(page.read_text()))
    assert "2 runs compared" in text
    assert "top-1" in text
    with pytest.raises(UsageError, match="at least one folder must hold a run"):
        compare([tmp_path / "nowhere"], page)


def changed(folder: Path, name: str, key: str, value: object) -> Path:
    """A copy of a run beside it, in which a JSON file has another value."""
    other = Path(shutil.copytree(folder, folder.parent / "changed"))
    document = json.loads((other / name).read_text())
    (other / name).write_text(json.dumps({**document, key: value}))
    return other


@pytest.mark.parametrize(
    ("name", "key", "value", "error"),
    [
        ("metrics.json", "seconds", 5, "AttributeError"),
        ("metrics.json", "seconds", {"total": 10**400}, "OverflowError"),
        ("evidence.json", "trust", [1], "AttributeError"),
        ("evidence.json", "trust", {"expected_drop": 1.0, "interval": [0.5]}, "IndexError"),
        ("evidence.json", "test", "mine", "AttributeError"),
    ],
)
def test_compare_names_a_run_with_unexpected_values_and_compares_the_rest(
    run: Path, undrawn: None, tmp_path: Path, name: str, key: str, value: object, error: str
) -> None:
    damaged = changed(run, name, key, value)
    found = compare([run, damaged], tmp_path / "c.html")
    assert [row.name for row in found.rows] == ["run"]
    (note,) = found.notes
    assert f"{damaged} is not compared: its files hold values that no run writes" in note
    assert error in note
    with pytest.raises(UsageError, match=r"at least one folder must hold a run.*no run writes"):
        compare([damaged], tmp_path / "c.html")
    assert main(["report", str(damaged)]) == 0  # as the note advises


@pytest.mark.parametrize("value", [[1], 5, {"a": 1}])
@pytest.mark.parametrize("key", ["weights_sha256", "test"])
def test_compare_takes_what_is_not_text_for_unknown(
    run: Path, undrawn: None, tmp_path: Path, key: str, value: object
) -> None:
    found = compare([run, changed(run, "config.json", key, value)], tmp_path / "c.html")
    if key == "test":
        assert [row.name for row in found.rows] == ["run", "changed"]
    else:
        assert [row.network for row in found.apart] == [None]
        assert "its weights have the hash unknown" in found.notes[0]


def test_text_that_is_not_unicode_is_damage(run: Path, undrawn: None, tmp_path: Path) -> None:
    """JSON can spell half of a surrogate pair, which no page can hold."""
    damaged = changed(run, "config.json", "bits", "\ud800")
    problem = r"config.json is damaged or was modified (it holds '\ud800', which is no character)"
    assert problem in str(page_of(damaged))
    assert any(problem in note for note in compare([damaged], tmp_path / "c.html").notes)


def test_table_of_runs_shows_brackets(
    run: Path, undrawn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are no markup of the terminal."""
    other = changed(run, "config.json", "bits", "[/x]").rename(tmp_path / "[red]run")
    assert main(["compare", str(other), "--out", str(tmp_path / "c.html")]) == 0
    printed = capsys.readouterr().out
    assert "[/x]" in printed
    assert "[red]run" in printed


def test_page_names_the_runs_that_the_plot_leaves_out() -> None:
    rows = [row("a", bytes=1, accuracy=90.0), row("b", bytes=2, accuracy=91.0)]
    page = str(Text(_page(side_by_side([*rows, row("untested", bytes=3)]))))
    assert (
        "Not in the plot, because the size or the quality (top-1) is not known: untested." in page
    )
    assert "there is no plot" in str(Text(_page(side_by_side(rows[:1]))))


def test_unfinished_run_is_the_only_reason_for_missing_evidence(run: Path) -> None:
    for name in ("metrics.json", "evidence.json", "evidence.npz"):
        (run / name).unlink()
    (problem,) = set(read_run(run).problems.values())
    assert problem.startswith("the run has not finished")


def test_comparison_escapes_names(run: Path, tmp_path: Path) -> None:
    evil = run.rename(tmp_path / "<b>bold<")
    compare([evil], tmp_path / "c.html")
    page = Text((tmp_path / "c.html").read_text())
    assert "<b>bold<" in str(page)
    assert "b" not in [tag for tag, _ in page.tags]


# The terminal


def test_print_run_shows_size_drop_and_verdict(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gdfq.cli.console import print_run

    found = read_run(run)
    print_run(found)
    printed = capsys.readouterr().out
    assert "times smaller" in printed
    assert lost_or_gained(present(found.drop)) in printed
    assert verdict(found).sentence.split(":")[0] in printed
    print_run(replace(found, evidence={}))


def test_errors_behind_a_sigmoid_are_said_to_be_those_of_the_logits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gdfq.cli.console import print_run

    student = {
        "error_percent": {"mask": 163.9, "depth": 2.5},
        "decisions_percent": {"mask": 99.5},
    }
    run = made(metrics={"student": student, "seconds": {"total": 1.0}, "steps": 1})
    print_run(run)
    out = capsys.readouterr().out
    assert "logits of mask" in out
    assert "logits of depth" not in out
    shown = instance(sections_test(run), str)
    assert "Equal decisions (a probability above one half): mask 99.50 %." in shown
    assert "Relative errors of its outputs: logits of mask 163.90 %, depth 2.50 %." in shown


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        ({"trust": {"expected_drop": None, "reason": "Too few images."}}, "Too few images."),
        ({"missing": {"trust": "MemoryError: full"}}, "The estimate failed: MemoryError: full."),
    ],
)
def test_print_run_says_why_the_drop_is_not_estimated(
    evidence: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from gdfq.cli.console import print_run

    metrics = {"seconds": {"total": 3.0}, "steps": 12}
    print_run(made(metrics=metrics, evidence=evidence))
    assert f"No estimate of the accuracy drop: {reason}\n" in capsys.readouterr().out
    accuracy = measured(91.0, 90.0)["metrics"]
    print_run(made(metrics={**metrics, **accuracy}, evidence=evidence))
    assert "No estimate" not in capsys.readouterr().out


def test_bench_adds_its_timings_to_the_run(run: Path, undrawn: None) -> None:
    setting = ["--batch", "1", "--threads", "1"]
    assert main(["bench", str(run), "--seconds", "0.01", *setting]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert [t["file"] for t in metrics["bench"]] == ["full precision", "student.onnx"]
    assert re.search("times (as fast|slower)", str(page_of(run)))


# TensorBoard


def test_tensorboard_files_hold_losses_and_ranges(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'gdfq[tensorboard]'")
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gdfq.execution.progress import Step
    from gdfq.execution.tensorboard import TensorBoard

    with TensorBoard(tmp_path) as listener:
        for index in (1, 2):
            listener(Step("tune", index, 2, {"kd": torch.tensor(3.0 / index)}, 0.5, {"relu": 4.0}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"tune/kd", "tune/rate", "tune/range/relu"}
    assert [event.value for event in events.Scalars("tune/kd")] == [3.0, 1.5]


def test_missing_tensorboard_is_reported_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gdfq.execution.tensorboard.find_spec", lambda _: None)
    words = ["quantize", "nowhere.py:net", "--out", str(tmp_path / "out"), "--tensorboard"]
    assert main(words) == 2
    assert "pip install 'gdfq[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_report_is_of_the_file_of_the_runs_target(run: Path, undrawn: None) -> None:
    (run / "student.tflite").write_bytes(b"x" * 12345)
    config, metrics = (json.loads((run / name).read_text()) for name in (CONFIG, METRICS))
    inside = {"agreement": 100.0, "images": 32}
    exported = {"path": "student.tflite", "target": "litert", "sha256": "abc", "inside": inside}
    (run / CONFIG).write_text(json.dumps(config | {"target": "litert"}))
    (run / METRICS).write_text(json.dumps(metrics | {"exports": {"student.tflite": exported}}))
    page = gdfq.write_report(run).read_text()
    assert "student.tflite has 12,345 bytes" in page
    assert "LiteRT predicts the same class as the simulation for 100.0 % of 32 images" in page
    assert "SHA-256 of student.tflite" in page
    assert "gdfq bench" in page.split("What to do next")[0]
