"""Image folders: which files count, in which order, and with which labels."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import gdfq
from gdfq.data.class_names import class_names, imagenet
from gdfq.data.datasets import load_data
from gdfq.data.folders import class_indices, read_folder
from gdfq.errors import GdfqWarning, UsageError


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path, "PNG")


def named(folder: Path, classes: int | None, names: object = None) -> list[tuple[str, int]]:
    """Paths of the images with their labels."""
    found = read_folder(folder, classes, class_names(names))
    assert found.labels is not None, found.rule
    files = (str(path.relative_to(folder)) for path in found.files)
    return list(zip(files, found.labels, strict=True))


def test_read_folder_ignores_hidden_entries_and_those_of_systems(tmp_path: Path) -> None:
    image(tmp_path / "b" / "x.png")
    image(tmp_path / "a" / "x.png")
    for name in (".ipynb_checkpoints", "__MACOSX", ".thumbnails", "@eaDir"):
        image(tmp_path / name / "y.png")
        image(tmp_path / "a" / name / "y.png")
    for folder in (tmp_path, tmp_path / "a"):
        for name in (".DS_Store", "Thumbs.db", "._x.png", ".hidden.jpg", "desktop.ini"):
            (folder / name).write_bytes(b"\0\5\26\7")
    assert named(tmp_path, 2) == [("a/x.png", 0), ("b/x.png", 1)]


def test_read_folder_has_the_order_of_torchvision(tmp_path: Path) -> None:
    """Folders by their path, then the files of each, as `sorted(os.walk(...))` has them."""
    for name in ("a/z.png", "a/b/a.png", "a/b-c/a.PNG", "a/b/Z.png", "a/b/d/e/x.JPG", "B/x.png"):
        image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert named(tmp_path, 2) == [
        ("B/x.png", 0),
        ("a/z.png", 1),
        ("a/b/Z.png", 1),
        ("a/b/a.png", 1),
        ("a/b-c/a.PNG", 1),
        ("a/b/d/e/x.JPG", 1),
    ]
    reference = [
        str((Path(root) / name).relative_to(tmp_path))
        for root, _, names in sorted(os.walk(tmp_path / "a"))
        for name in sorted(names)
        if name != "notes.txt"
    ]
    assert [file for file, label in named(tmp_path, 2) if label == 1] == reference


def test_read_folder_does_not_follow_a_link_in_a_circle(tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert named(tmp_path, 1) == [("a/x.png", 0)]


def test_read_folder_counts_an_empty_folder_as_a_class(tmp_path: Path) -> None:
    image(tmp_path / "b" / "x.png")
    (tmp_path / "a").mkdir()
    assert named(tmp_path, 2) == [("b/x.png", 1)]


@pytest.mark.parametrize(
    ("folders", "classes", "labels"),
    [
        (["3", "4", "9"], 10, [3, 4, 9]),  # some classes, at their word
        (["00", "01", "07"], 10, [0, 1, 7]),
        (["1", "2", "3"], 3, [0, 1, 2]),  # all of 1..N
        (["1", "2"], 3, [1, 2]),
        (["cat", "dog"], 2, [0, 1]),
        (["0", "1", "other"], 3, [0, 1, 2]),
    ],
)
def test_folders_have_the_classes_that_their_names_say(
    folders: list[str], classes: int, labels: list[int]
) -> None:
    found, _ = class_indices(sorted(folders), classes)
    assert [found[name] for name in folders] == labels


def test_numbers_are_the_classes_and_differ_from_torchvision_with_a_warning() -> None:
    folders = sorted(map(str, range(12)))
    with pytest.warns(GdfqWarning, match="10 before 2"):
        found, _ = class_indices(folders, 12)
    assert found == {str(number): number for number in range(12)}
    with pytest.warns(GdfqWarning, match="'c10' comes before 'c2'"):
        found, _ = class_indices(sorted(f"c{i}" for i in range(1, 11)), 10)
    assert found["c10"] == 1


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (["a", "b"], 3, r"3 classes; there are 2: a, b.*classes\.txt"),
        (["a", "b", "c"], 2, "2 classes; there are 3"),
        (["-1", "0", "1"], 3, r"lie in 0\.\.2.*-1, 0, 1"),
        (["1", "3"], 3, r"lie in 0\.\.2"),
        (["01", "1"], 5, "the same number"),
        (["n01440764", "n01443537"], 10, "10 classes; there are 2"),
    ],
)
def test_folders_of_unknown_class_are_refused(
    folders: list[str], classes: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        class_indices(folders, classes)


def test_folders_are_recognised_by_the_names_of_the_network() -> None:
    names = class_names({0: "dog", 1: "Great White-shark, shark", 2: "cat"})
    found, rule = class_indices(["cat", "great_white_shark"], 3, None, names)
    assert found == {"cat": 2, "great_white_shark": 1}
    assert "class names" in rule
    with pytest.raises(UsageError, match=r"the network's 3 classes \(dog, .*there are 3: a, b, c"):
        class_indices(["a", "b", "c"], 3, None, names)
    with pytest.raises(UsageError, match="are the same"):
        class_indices(["cat", "Cat"], 3, None, names)


def test_ids_of_imagenet_are_recognised() -> None:
    ids = imagenet()
    assert [ids[0], ids[217], ids[999]] == [("n01440764",), ("n02102040",), ("n15075141",)]
    found, _ = class_indices(["n02102040", "n03425413"], 1000)  # two of Imagenette's ten
    assert found == {"n02102040": 217, "n03425413": 571}  # English springer, gas pump
    names = ["tench", *(f"name{i}" for i in range(998)), "toilet tissue"]
    found, _ = class_indices(["n02102040"], 1000, None, class_names(names))
    assert found == {"n02102040": 217}


@pytest.mark.parametrize("values", [["LABEL_0", "LABEL_1"], ["0", "1"], {1: "a"}, [], None, [1]])
def test_placeholders_are_no_class_names(values: object) -> None:
    assert class_names(values) is None


def test_classes_file_comes_first(tmp_path: Path) -> None:
    image(tmp_path / "10" / "x.png")
    image(tmp_path / "2" / "x.png")
    (tmp_path / "classes.txt").write_text("\ufeff1\r\n10\r\n2\r\n")
    assert named(tmp_path, 3) == [("10/x.png", 1), ("2/x.png", 2)]
    image(tmp_path / "5" / "x.png")
    assert "also 5" in read_folder(tmp_path, 3).rule
    with pytest.raises(UsageError, match=r"each of the network's 4 classes.*has 3"):
        read_folder(tmp_path, 4)


def test_folder_of_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        image(tmp_path / split / "a" / "x.png")
    with pytest.raises(UsageError, match=r"Give one of them, as .*/train"):
        read_folder(tmp_path, 2)
    image(tmp_path / "train" / "x.png")  # a class that is called so
    assert len(named(tmp_path, 2)) == 3


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    image(tmp_path / "x.png")
    data = load_data(tmp_path, (1, 4, 4), 2)
    assert (len(data), data.labels) == (1, None)
    image(tmp_path / "a" / "y.png")
    with pytest.warns(GdfqWarning, match=r"1 image files, such as x\.png, lie beside"):
        assert named(tmp_path, 1) == [("a/y.png", 0)]


def test_images_of_other_formats_are_told(tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "y.HEIC").write_bytes(b"")
    with pytest.warns(GdfqWarning, match=r"1 files with \.heic"):
        assert len(read_folder(tmp_path, 1).files) == 1


@given(st.sets(st.integers(0, 30), min_size=1))
def test_numbers_below_the_classes_are_taken_at_their_word(numbers: set[int]) -> None:
    folders = sorted(f"{number:02}" for number in numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GdfqWarning)
        found, _ = class_indices(folders, 32)
    assert found == {f"{number:02}": number for number in numbers}


def test_evaluate_says_why_a_folder_has_no_labels(
    tmp_path: Path, quantized: gdfq.QuantizedNetwork
) -> None:
    path = tmp_path / "cat" / "x.png"
    path.parent.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    with pytest.raises(UsageError, match="5 classes; there are 1: cat"):
        quantized.evaluate(tmp_path)
