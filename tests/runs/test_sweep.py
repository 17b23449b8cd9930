"""Sweep files: what they may contain, and the commands that follow."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdfq.errors import UsageError
from gdfq.runs.sweep import Network, Sweep, read_sweep


def written(folder: Path, text: str) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


def read(folder: Path, text: str) -> Sweep:
    return read_sweep(written(folder, text))


def test_sweep_has_every_combination_once(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        """
        networks:
          - a.py:net
          - {model: "ptcv:b", name: b, input: [3, 32, 32], classifier: false, size: 300KB}
        bits: [w4a4, w8a8]
        recipes: quick
        layer_bits: [[], [first=8, last=float]]
        seeds: [0, 1, 1]
        steps: 40
        """,
    )
    cells = sweep.cells()
    assert len(cells) == 2 * 2 * 2 * 2
    assert len({cell.folder for cell in cells}) == len(cells)
    assert cells[0].words() == [
        "--bits=w4a4", "--recipe=quick", "--steps=40", "--seed=0", "--", "a.py:net",
    ]  # fmt: skip
    assert cells[-1].words() == [
        "--input=3x32x32", "--no-classifier", "--bits=w8a8", "--recipe=quick", "--layer-bits=first=8",
        "--layer-bits=last=float", "--steps=40", "--seed=1", "--", "ptcv:b",
    ]  # fmt: skip
    assert cells[-1].folder.startswith("b-w8a8-quick-first=8-last=float-seed1-")


def test_bits_that_are_not_said_are_those_of_the_placement(tmp_path: Path) -> None:
    """As in `gdfq quantize`."""
    cells = read(tmp_path, "networks: [a]\nrecipes: [fast, paper]\nplacement: [full, relu]").cells()
    found = [(cell.recipe, cell.placement, cell.bits) for cell in cells]
    assert found == [
        (recipe, placement, bits)
        for recipe in ("fast", "paper")
        for placement, bits in (("full", "w4a8"), ("relu", "w4a4"))
    ]
    assert [
        cell.bits for cell in read(tmp_path, "networks: [a]\nrecipes: [fast, paper]").cells()
    ] == [
        "w4a8",
        "w4a4",
    ]


@pytest.mark.parametrize(("budget", "word"), [("2m30s", "2m30s"), (90, "90"), (0.5, "0.5")])
def test_each_run_of_a_sweep_has_its_budget(tmp_path: Path, budget: object, word: str) -> None:
    (cell,) = read(tmp_path, f"networks: [a]\nbudget: {budget}").cells()
    assert f"--budget={word}" in cell.words()


def test_cell_with_another_option_has_another_folder() -> None:
    one, other = (Sweep((Network("a.py:n", mean=mean),)).cells()[0] for mean in ("0", "0.5"))
    assert one.folder[:-8] == other.folder[:-8]
    assert one.folder != other.folder


def test_proxies_of_a_sweep_are_passed_on_and_refused_where_they_are_of_no_use(
    tmp_path: Path,
) -> None:
    (cell,) = read(tmp_path, "networks: [{model: a, proxy: pool}]").cells()
    assert "--proxy=pool" in cell.words()
    for more, said in (("budget: 5m", "does not count"), ("recipes: synq", "learns labels")):
        with pytest.raises(UsageError, match=said):
            read(tmp_path, f"networks: [{{model: a, proxy: pool}}]\n{more}")


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (Network("nets.py:make", weights="b.safetensors"), "weights"),
        (Network("nets.py:make", weights="a.safetensors", mean="0.5", proxy="pool"), "mean, proxy"),
        (Network("elsewhere/nets.py:make", weights="a.safetensors"), "model"),
        (Network("ptcv:resnet20", name="nets.py:make", weights="a.safetensors"), "model, name"),
    ],
)
def test_different_networks_of_one_name_are_refused(other: Network, differs: str) -> None:
    """The table would give their mean, as if they were seeds of one network."""
    one = Network("nets.py:make", weights="a.safetensors")
    said = f"differ in {differs} are called 'nets.py:make'. Give each a name of its own"
    with pytest.raises(UsageError, match=said):
        Sweep((one, Network("b.py:n"), other))
    named = replace(other, name="other")
    assert len({cell.network.title for cell in Sweep((one, named)).cells()}) == 2


def test_equal_networks_of_a_sweep_are_duplicates() -> None:
    one, same = (Network("nets.py:make", weights="a.safetensors") for _ in range(2))
    assert len(Sweep((one, same)).cells()) == 1


def test_size_is_passed_to_automatic_bits_only() -> None:
    cells = Sweep((Network("a.py:n", size="9KB"),), bits=("auto", "w4a4")).cells()
    assert [("--size=9KB" in cell.words()) for cell in cells] == [True, False]


def test_model_is_not_read_as_an_option() -> None:
    assert Sweep((Network("--out=/elsewhere"),)).cells()[0].words()[-2:] == [
        "--",
        "--out=/elsewhere",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "networks: [a]\nbit: w4a4",
            "line 2: a sweep has no key 'bit'. Its keys are networks, bits",
        ),
        ("networks:\n  - {model: a}\n  - {modle: b}", "line 3: a network has no key 'modle'"),
        ("networks: [a]\nseeds: [0]\nseeds: [1]", "line 3: seeds is given twice"),
        ("networks: [a\nseeds: 1", "line 2"),
        ("- a", "not a mapping"),
        ("", "not a mapping"),
        ("bits: w4a4", "must list its networks"),
        ("networks: []", "networks must have at least one value"),
        ("networks: [{name: a}]", "must have a model"),
        ("networks: [a]\nbits: w9a9", "2 to 8 bits; got 9"),
        ("networks: [a]\nbits: auto", "bits auto needs a size"),
        ("networks: [a]\nrecipes: fats", "there is no recipe 'fats'"),
        ("networks: [a]\nlayer_bits: [first]", "PATTERN=float"),
        ("networks: [a]\nplacement: t2", "placement must be one of relu, full, tokens; got 't2'"),
        ("networks: [a]\nseeds: [one]", "seeds must be whole numbers, at least 0; got 'one'"),
        ("networks: [a]\nseeds: [true]", "got True"),
        ("networks: [a]\nsteps: 1.5", "steps must be whole numbers"),
        ("networks: [a]\nsteps: 1", "needs at least 4"),
        ("networks: [a]\nbudget: soon", "such as 90s, 5m"),
        ("networks: [a]\nbudget: [5m, 1h]", "budget must be text or a number"),
        ("networks: [a]\nbudget: true", "budget must be text or a number"),
        ("networks: [a]\nbudget: 5m\nsteps: 8", "steps was given, too"),
        ("networks: [{model: a, classifier: maybe}]", "classifier must be true or false"),
        ("networks: [{model: a, test: {b: c}}]", "test must be text or a number"),
        ("networks: [a]\nseeds: 2024-99-99", "valid YAML"),
        ("networks: [!!python/object/apply:os.getcwd []]", "valid YAML"),
        ("!!set {networks}", "not a mapping"),
        ("networks: [{model: a, !!binary name: b}]", "line 1: a network has no key 'name'"),
        ("networks: &n [a]\nbits: *n", "line 2: a sweep must not contain aliases"),
        (
            "networks: [a]\nlayer_bits: " + "[" * 10**5,
            "line 2: lists and mappings of a sweep must be nested at most 8 deep",
        ),
        (
            f"networks: [a]\nseeds: {list(range(101))}\nsteps: 1\nbits: {['w4a4'] * 100}",
            "at most 10000 runs; this one has 10100",
        ),
        ("networks: [a]\n" + "#" * 2**20, "at most 1048576 bytes"),
    ],
)
def test_read_sweep_refuses_invalid_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    assert said in str(raised.value)
    assert "sweep.yaml" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_read_sweep_refuses_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"networks: [\xff]")
    with pytest.raises(UsageError, match="cannot be read"):
        read_sweep(tmp_path / "latin.yaml")


_KEYS = st.sampled_from(
    ["networks", "bits", "seeds", "layer_bits", "steps", "budget", "model", "test", "size"]
)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | _KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=4).map(json.dumps) | st.text(max_size=60))
def test_read_sweep_accepts_or_refuses_any_file(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"  # JSON is YAML
    file.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UsageError):
        assert read_sweep(file).cells()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("mean: [123.675, 116.28, 103.53]", r"net: mean and std must be .*Give mean 0\.485"),
        ("std: 0", "net: std must be positive"),
        ("mean: grey", "mean and std of net must be numbers"),
    ],
)
def test_sweep_refuses_normalisation_before_anything_runs(
    tmp_path: Path, values: str, message: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"networks:\n  - {{model: 'net.py:f', name: net, {values}}}\n")
    with pytest.raises(UsageError, match=message):
        read_sweep(path)
