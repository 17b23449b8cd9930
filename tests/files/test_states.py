"""States of parts of a run as bytes."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdfq.files.states import Frozen, digest_of, from_bytes, to_bytes


def unequal(a: Any, b: Any) -> bool:
    """Whether two trees differ, tensors by value, type and strides."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype != b.dtype
            or a.shape != b.shape
            or a.stride() != b.stride()
            or not torch.equal(a, b)
        )
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(unequal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) != len(b) or any(map(unequal, a, b))
    return type(a) is not type(b) or a != b


def test_state_keeps_numbers_keys_types_and_strides() -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state: dict[str, Any] = {
        "images": images,
        "one image": images[:1],
        "part": images[:, 1],
        "flipped": images.transpose(0, 3)[1:],
        "random": torch.Generator().manual_seed(3).get_state(),
        "nothing": None,
        "groups": [{"lr": 0.1 + 0.2, "params": [0, 1]}],
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "yes": True,
        "counts": torch.arange(3),
    }
    dense = {**state, "part": images[:, 1].clone(), "flipped": state["flipped"].clone()}
    assert not unequal(dense, from_bytes(to_bytes(state, str), Frozen))


def test_large_tensors_keep_all_bits_and_strides_in_fewer_bytes() -> None:
    images = (
        torch.randn(4, 3, 64, 64).clamp(-0.5, 0.5).contiguous(memory_format=torch.channels_last)
    )
    state = {"images": images, "labels": torch.arange(10_000), "mask": images > 0}
    data = to_bytes(state, str)
    assert len(data) < 0.8 * sum(tensor.nbytes for tensor in state.values())
    assert not unequal(state, from_bytes(data, Frozen))


def test_digest_tells_tensors_apart_that_a_run_could_tell_apart() -> None:
    tensor = torch.zeros(2, 3, 4, 4)
    others = [
        tensor.clone().index_fill_(0, torch.tensor(1), 1),
        -tensor,  # −0
        tensor.int(),
        tensor.view(6, 1, 4, 4),
        tensor.contiguous(memory_format=torch.channels_last),
    ]
    assert len({digest_of(x) for x in (tensor, *others)}) == 1 + len(others)
    assert digest_of(torch.zeros(3, 3, 4, 4)[:2]) == digest_of(tensor)


@settings(deadline=None, max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inside: st.lists(inside) | st.dictionaries(st.text() | st.integers(), inside),
        max_leaves=12,
    )
)
def test_state_round_trips_for_any_plain_value(state: object) -> None:
    assert not unequal(state, from_bytes(to_bytes(state, str), Frozen))


def test_state_of_an_optimizer_continues_its_updates() -> None:
    def make() -> tuple[Tensor, torch.optim.Adam]:
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, torch.optim.Adam([{"params": [weight], "lr": 0.1}], betas=(0.8, 0.95))

    def update(weight: Tensor, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        (weight.square().sum() * weight[0]).backward()
        optimizer.step()

    weight, optimizer = make()
    update(weight, optimizer)
    data = to_bytes({"w": weight, "o": optimizer.state_dict()}, str)
    other, restored = make()
    state = from_bytes(data, Frozen)
    other.data.copy_(state["w"])
    restored.load_state_dict(state["o"])
    for pair in ((weight, optimizer), (other, restored)):
        update(*pair)
    assert torch.equal(weight, other)
