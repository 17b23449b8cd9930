"""Names of tensors in graphs."""

from keyword import iskeyword

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import networks, unusual
from torch import fx, nn

from gdfq.graph.capture import capture
from gdfq.graph.names import safe_paths
from gdfq.graph.tensors import tensors_of

part = st.text(min_size=1, max_size=8).map(lambda text: text.replace(".", ":"))
name = st.one_of(st.sampled_from([*unusual.NAMES, "forward", "training"]), part)


@given(st.lists(st.lists(name, min_size=1, max_size=3).map(".".join), unique=True, max_size=8))
@example(["a-b", "a_b", "a-b.c", "a_b.c", "a_b_"])
@example(["::name::"])  # __name__ is an attribute of the class alone
def test_safe_names_are_distinct_and_can_be_attributes_of_graphs(paths: list[str]) -> None:
    safe = safe_paths(paths)
    assert list(safe) == paths
    assert len(set(safe.values())) == len(paths)
    for path, found in safe.items():
        assert found.count(".") == path.count(".")
        for each in found.split("."):
            assert not iskeyword(each)
            assert not hasattr(fx.GraphModule, each)
            assert each.isascii()
            assert each.replace("_", "a").isalnum()


def test_ordinary_names_stay_as_they_are() -> None:
    paths = ["layer1.0.conv1.weight", "fc.bias", "_x", "Größe.weight", "level_1.weight"]
    assert safe_paths(paths) == {path: path for path in paths} | {"Größe.weight": "Gr__e.weight"}


def test_names_that_become_equal_get_an_underscore() -> None:
    assert safe_paths(["a-b.weight", "a_b.weight", "a b.weight"]) == {
        "a_b.weight": "a_b.weight",
        "a-b.weight": "a_b_.weight",
        "a b.weight": "a_b__.weight",
    }


@settings(max_examples=15)
@given(st.lists(name, unique=True, min_size=1, max_size=4))
def test_network_with_any_names_of_modules_is_captured(names: list[str]) -> None:
    names = [one for one in names if not hasattr(nn.Module(), one)]
    module = unusual.named(*names, "last of all")
    captured = capture(module, torch.zeros(1, *unusual.SHAPE))
    x = networks.images(3, shape=unusual.SHAPE)
    torch.testing.assert_close(captured.network(x), module(x))
    assert len(tensors_of(captured.network)) == 2 * (len(names) + 1)


def test_modules_with_the_names_of_methods_are_captured() -> None:
    """Assignment allows them, and nn.Sequential calls them."""
    module = unusual.named("level-1", "last")
    for name in ("half", "forward", "train", "children"):
        setattr(module, name, nn.Linear(5, 5))
    captured = capture(module.eval(), torch.zeros(1, *unusual.SHAPE))
    x = networks.images(3, shape=unusual.SHAPE)
    torch.testing.assert_close(captured.network(x), module(x))
    names = set(tensors_of(captured.network))
    assert {"half_.weight", "forward_.weight", "train_.weight", "children_.weight"} < names
    assert list(module._modules)[-4:] == ["half", "forward", "train", "children"]
