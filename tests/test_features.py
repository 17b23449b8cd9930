"""Folding of batch norms and the ends of blocks."""

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdfq.capture import capture
from gdfq.features import block_ends, with_features
from gdfq.folding import fold_batch_norms
from gdfq.grid import Bits
from gdfq.operators import name_of
from gdfq.student import Scheme, build_student


class Awkward(nn.Module):
    """A shared convolution behind two batch norms, one before a layer, one transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3, bias=False)
        self.up_norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.head_norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        x = self.shared(self.first(x))
        x = F.relu(self.norms[0](x)) + x  # the layer's output is used twice: it must not fold
        x = F.relu(self.norms[1](self.shared(x)))
        x = F.relu(self.norms[2](self.shared(x)))
        x = F.relu(self.up_norm(self.up(x)))
        return self.head_norm(self.head(x.mean((2, 3))))


@pytest.fixture(scope="module")
def awkward():
    torch.manual_seed(0)
    network = Awkward()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.normal_()  # negative scales too
                module.bias.data.normal_()
    return capture(network.eval(), torch.randn(2, 3, 8, 8))


def test_folding_keeps_the_function_and_leaves_what_cannot_fold(awkward):
    folded = fold_batch_norms(awkward)
    x = torch.randn(5, 3, 8, 8)
    assert torch.allclose(folded.network(x), awkward.network(x), atol=1e-4)
    assert len(awkward.batch_norms) == 6
    assert len(folded.batch_norms) == 2  # before a layer, and behind a shared output
    assert len(awkward.batch_norms) == 6  # the teacher itself is left alone


def test_a_learned_student_of_it_is_near_at_eight_bits(awkward):
    from gdfq.freeze import freeze
    from gdfq.progress import silent
    from gdfq.sources import Batch
    from gdfq.tuning.calibrate import calibrate_

    x = torch.randn(64, 3, 8, 8)
    student = build_student(awkward, Scheme(Bits(8, 8), "t1"), quantizers="learned")
    calibrate_(student, [Batch(x, torch.zeros(64), None)], steps=1, listener=silent)
    wanted = awkward.network(x)
    for network in (student, freeze(student)):
        with torch.no_grad():
            assert float((network(x) - wanted).norm() / wanted.norm()) < 0.05
    with torch.no_grad():
        assert torch.allclose(student(x), freeze(student)(x), atol=1e-4)


def test_block_ends_of_a_residual_network():
    folded = fold_batch_norms(capture(networks.make("Residual"), networks.images(2)))
    ends = block_ends(folded.network.graph)
    # Not the branch inside the block, not the pooled tensor.
    assert [node.name for node in ends] == ["relu", "relu_1"]
    logits, features = with_features(folded.network, ends)(networks.images(4))
    assert torch.equal(logits, folded.network(networks.images(4)))
    pooled = F.avg_pool2d(features[1], features[1].shape[-1]).flatten(1)
    head = folded.network.get_parameter("fc.weight"), folded.network.get_parameter("fc.bias")
    assert torch.allclose(F.linear(pooled, *head), logits, atol=1e-5)


def test_the_students_features_are_its_quantized_values():
    teacher = capture(networks.make("Residual"), networks.images(2))
    student = build_student(teacher, Scheme(Bits(4, 2), "t1"), quantizers="learned")
    student.eval()
    for quantizer in student.activations:
        quantizer.observing = True
    student(networks.images(8))
    for quantizer in student.activations:
        quantizer.observing = False
    _, features = student.with_features(["relu", "relu_1"])(networks.images(8))
    assert [len(feature.unique()) <= 4 for feature in features] == [True, True]


def test_a_network_of_one_layer_has_no_block_ends():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    graph = capture(network, torch.randn(2, 3, 2, 2)).network.graph
    assert block_ends(graph) == []
    assert any(name_of(node) == "aten.linear.default" for node in graph.nodes)
