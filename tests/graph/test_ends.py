"""Networks are divided in a body, which returns logits, and an end, which returns probabilities."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gdfq import UsageError
from gdfq.graph.capture import Captured, capture
from gdfq.graph.ends import (
    are_probabilities,
    are_unit_vectors,
    body_names,
    describe,
    joined,
    output_names,
    split,
)
from gdfq.graph.outputs import flattened, in_order

End = Callable[[Tensor], Any]
CLASSES = 5


class Ending(nn.Module):
    """A convolution, and a function of its output [N, 5, 4, 4]."""

    def __init__(self, end: End) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.end = nn.Conv2d(3, CLASSES, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.conv(x))


def logits(x: Tensor) -> Tensor:
    return 3 * x.mean((2, 3))


def captured(end: End, classifier: bool | None = None) -> tuple[nn.Module, Captured]:
    model = Ending(end).eval()
    return model, capture(model, torch.randn(2, 3, 6, 6), classifier=classifier)


def by_hand(x: Tensor) -> Tensor:
    exponentials = (x - x.amax(1, keepdim=True)).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


SOFTMAX: dict[str, End] = {
    "softmax": lambda x: logits(x).softmax(1),
    "last dimension": lambda x: logits(x).softmax(-1),
    "with a dtype": lambda x: torch.softmax(logits(x), 1, dtype=torch.float32),
    "softmin": lambda x: F.softmin(-logits(x), 1),
    "by hand": lambda x: by_hand(logits(x)),
    "by hand, unstable": lambda x: logits(x).exp() / logits(x).exp().sum(1, keepdim=True),
    "then flattened": lambda x: (3 * F.adaptive_avg_pool2d(x, 1)).softmax(1).flatten(1),
    "then viewed": lambda x: logits(x).softmax(1).view(x.shape[0], CLASSES),
    "then squeezed": lambda x: (3 * x.mean((2, 3), keepdim=True)).softmax(1).squeeze(3).squeeze(2),
    "unsqueezed": lambda x: logits(x).unsqueeze(1).softmax(-1).squeeze(1),
    "in percent": lambda x: 100 * logits(x).softmax(1),
    "clamped": lambda x: logits(x).softmax(1).clamp(1e-7, 1),
    "in a dictionary": lambda x: {"probabilities": logits(x).softmax(1)},
    "in a tuple": lambda x: (logits(x).softmax(1),),
    "exp of log-softmax": lambda x: logits(x).log_softmax(1).exp(),
}
LOG_SOFTMAX: dict[str, End] = {
    "log-softmax": lambda x: F.log_softmax(logits(x), 1),
    "special": lambda x: torch.special.log_softmax(logits(x), 1),
    "log of softmax": lambda x: (logits(x).softmax(1) + 1e-12).log(),
}


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        *(pytest.param(end, "softmax", id=name) for name, end in SOFTMAX.items()),
        *(pytest.param(end, "log_softmax", id=name) for name, end in LOG_SOFTMAX.items()),
    ],
)
def test_body_of_a_softmax_returns_its_logits(end: End, kind: str) -> None:
    model, found = captured(end)
    plain = Ending(logits).eval()
    x = torch.randn(3, 3, 6, 6)
    assert (found.classes, found.ends.kinds, found.ends.dims) == (CLASSES, (kind,), (1,))
    name = {"softmax": "probabilities", "log_softmax": "log_probabilities"}[kind]
    assert output_names(found, found.ends) == [name]
    # A softmax by hand may hide what is subtracted from all logits.
    torch.testing.assert_close(found.network(x).log_softmax(1), plain(x).log_softmax(1))
    torch.testing.assert_close(found.returned(x), model(x))
    whole = joined(found.network, found.ends)
    torch.testing.assert_close(whole(x), flattened(model(x))[0])
    assert "the logits in front of the softmax" in describe(found, found.ends)


@pytest.mark.parametrize("name", SOFTMAX)
def test_split_inverts_joined(name: str) -> None:
    """A file holds the whole graph; what is read from it is divided again at the same place."""
    _, found = captured(SOFTMAX[name])
    whole = joined(found.network, found.ends)
    for node in whole.graph.nodes:  # as the check of a stored network does
        node.meta.pop("val", None)
    shapes = _Shapes(whole)
    with torch.no_grad():
        shapes.run(torch.randn(2, 3, 6, 6))
    body, ends = split(whole)
    x = torch.randn(3, 3, 6, 6)
    assert ends.kinds == ("softmax",)
    torch.testing.assert_close(body(x), found.network(x))
    torch.testing.assert_close(ends.apply([body(x)]), [whole(x)])


class _Shapes(torch.fx.Interpreter):
    def run_node(self, n: torch.fx.Node) -> Any:
        n.meta["val"] = value = super().run_node(n)
        return value


def test_logits_and_their_probabilities_are_one_output_of_the_body() -> None:
    def both(x: Tensor) -> dict[str, Tensor]:
        return {"logits": logits(x), "probabilities": logits(x).softmax(1)}

    def shared(x: Tensor) -> dict[str, Tensor]:
        values = logits(x)
        return {"logits": values, "probabilities": values.softmax(1)}

    model, found = captured(shared)
    x = torch.randn(3, 3, 6, 6)
    assert (found.classes, found.ends.sources) == (CLASSES, (0, 0))
    assert output_names(found, found.ends) == ["logits", "probabilities"]
    assert body_names(found, found.ends) == ["logits"]
    torch.testing.assert_close(found.returned(x), model(x))
    _, apart = captured(both)  # computed twice: two outputs
    assert apart.classes is None
    assert apart.ends.kinds == ("values", "softmax")


def test_temperature_belongs_to_the_logits() -> None:
    _, found = captured(lambda x: (logits(x) / 4).softmax(1))
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(found.network(x), Ending(logits)(x) / 4)


def test_mean_of_softmaxes_has_logarithms_as_logits() -> None:
    """An ensemble has no logits; softmax(log p) = p."""

    def ensemble(x: Tensor) -> Tensor:
        return (logits(x).softmax(1) + x.amax((2, 3)).softmax(1)) / 2

    model, found = captured(ensemble)
    x = torch.randn(3, 3, 6, 6)
    assert (found.classes, found.ends.kind) == (CLASSES, "softmax")
    torch.testing.assert_close(found.network(x), model(x).log())
    torch.testing.assert_close(found.returned(x), model(x))


@pytest.mark.parametrize(
    ("end", "shape"),
    [
        (lambda x: x.softmax(1), (5, 4, 4)),  # segmentation
        (lambda x: x.mean((2, 3)).view(-1, 1, 5).expand(-1, 3, 5).softmax(2).flatten(1), (3, 5)),
    ],
)
def test_softmax_of_many_vectors_is_no_classifier(end: End, shape: tuple[int, ...]) -> None:
    model, found = captured(end)
    x = torch.randn(3, 3, 6, 6)
    assert (found.classes, found.ends.kind) == (None, "softmax")
    assert found.network(x).shape[1:] == shape
    torch.testing.assert_close(found.returned(x), model(x))


def test_softmax_over_the_batch_is_no_end() -> None:
    _, found = captured(lambda x: logits(x).softmax(0))
    assert found.ends.kinds == ("values",)


@pytest.mark.parametrize(
    "end",
    [
        lambda x: logits(x).sigmoid(),
        lambda x: torch.special.expit(logits(x)),
        lambda x: logits(x).mean(1).sigmoid(),
        lambda x: logits(x).mean(1, keepdim=True).sigmoid(),
        lambda x: (logits(x) - 4).sigmoid(),  # as binary cross-entropy leaves it
    ],
)
def test_sigmoid_is_no_classifier_of_top1(end: End) -> None:
    model, found = captured(end)
    x = torch.randn(3, 3, 6, 6)
    assert (found.classes, found.ends.kind) == (None, "sigmoid")
    assert "independent decisions" in describe(found, found.ends)
    torch.testing.assert_close(found.network(x).sigmoid(), model(x))
    torch.testing.assert_close(found.returned(x), model(x))


def test_scaled_sigmoid_is_no_probability() -> None:
    """An angle or a depth, say: the number itself is matched."""
    _, found = captured(lambda x: 180 * logits(x).mean(1, keepdim=True).sigmoid())
    assert found.ends.kind == "values"


def test_logarithm_of_a_sigmoid_has_the_same_logits() -> None:
    _, found = captured(lambda x: F.logsigmoid(logits(x)))
    x = torch.randn(3, 3, 6, 6)
    assert (found.classes, found.ends.kind) == (None, "sigmoid")
    torch.testing.assert_close(found.network(x), Ending(logits)(x))


def test_sigmoid_of_classes_is_a_classifier_if_the_user_says_so() -> None:
    _, found = captured(lambda x: logits(x).sigmoid(), classifier=True)
    assert found.classes == CLASSES
    with pytest.raises(UsageError, match="classifier"):
        captured(lambda x: logits(x).mean(1, keepdim=True).sigmoid(), classifier=True)


def test_each_output_has_its_own_end() -> None:
    model, found = captured(lambda x: {"mask": x.softmax(1), "tags": logits(x).sigmoid(), "x": x})
    x = torch.randn(3, 3, 6, 6)
    assert found.ends.kinds == ("softmax", "sigmoid")  # x is the logits of the mask
    assert found.ends.sources == (0, 1, 0)
    torch.testing.assert_close(found.returned(x), model(x))


def norm(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=1, keepdim=True)
    return length


EMBEDDINGS: dict[str, End] = {
    "normalize": lambda x: F.normalize(logits(x)),
    "of a ReLU": lambda x: F.normalize(logits(x).relu()),
    "norm": lambda x: logits(x) / norm(logits(x)),
    "clamped norm": lambda x: logits(x) / norm(logits(x)).clamp(min=1e-6),
    "linalg.norm": lambda x: logits(x) / torch.linalg.norm(logits(x), dim=1, keepdim=True),
    "root of squares": lambda x: logits(x) / logits(x).pow(2).sum(1, keepdim=True).sqrt(),
    "reciprocal root": lambda x: (
        logits(x) * torch.rsqrt((logits(x) * logits(x)).sum(1, keepdim=True) + 1e-12)
    ),
    "root as a power": lambda x: logits(x) / (logits(x).square().sum(1, keepdim=True)) ** 0.5,
    "einsum": lambda x: logits(x) / torch.einsum("nc,nc->n", logits(x), logits(x)).sqrt()[:, None],
    "expanded": lambda x: logits(x).div(norm(logits(x)).expand_as(logits(x))),
}


@pytest.mark.check
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_unit_vectors_are_embeddings(name: str) -> None:
    _, found = captured(EMBEDDINGS[name])
    assert (found.classes, found.ends.kind) == (None, "unit_norm")
    assert "cosine" in describe(found, found.ends)
    _, told = captured(EMBEDDINGS[name], classifier=True)
    assert told.classes == CLASSES


def arcface(x: Tensor) -> Tensor:
    return F.linear(F.normalize(logits(x)), F.normalize(torch.eye(7, 5) + 0.3))


@pytest.mark.parametrize(
    "end",
    [
        logits,
        arcface,  # cosines with the class vectors
        lambda x: 64 * arcface(x),
        lambda x: 30 * F.normalize(logits(x)),  # logits on a sphere, as in NormFace
        lambda x: F.layer_norm(logits(x), (CLASSES,)),
        lambda x: F.normalize(logits(x), dim=0),
        lambda x: F.normalize(logits(x), p=1.0),
    ],
)
def test_other_outputs_are_classes(end: End) -> None:
    _, found = captured(end)
    assert found.classes in {CLASSES, 7}
    assert found.ends.kind == "values"
    assert output_names(found, found.ends) == ["logits"]


def test_unit_vectors_are_recognised_by_their_values() -> None:
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6], [0.0, 0.0]])
    assert are_unit_vectors(turned)  # a row of zeros is what a normalisation leaves of zeros
    assert not are_unit_vectors(2 * turned)
    assert not are_unit_vectors(turned[:1].repeat(3, 1))  # one vector says nothing
    assert not are_unit_vectors(torch.eye(4))  # one-hot probabilities
    assert are_probabilities(torch.eye(4))
    assert not are_probabilities(turned)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["softmax", "squeeze", "sigmoid", "log"]), max_size=4))
def test_network_with_any_end_returns_what_it_returned(functions: list[str]) -> None:
    def end(x: Tensor) -> Tensor:
        x = logits(x)
        for name in functions:
            x = {
                "softmax": lambda x: x.softmax(-1),
                "squeeze": lambda x: x.unsqueeze(2).squeeze(2),
                "sigmoid": torch.sigmoid,
                "log": lambda x: x.abs().clamp_min(1e-3).log(),
            }[name](x)
        return x

    model, found = captured(end)
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(found.returned(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        in_order(joined(found.network, found.ends)(x))[0], model(x), rtol=1e-4, atol=1e-5
    )
