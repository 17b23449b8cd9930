import pytest
import torch
from support import networks
from torch import nn

from gdfq.errors import GdfqError, UsageError
from gdfq.functional.grid import Bits, dequantize
from gdfq.graph.capture import Captured, capture
from gdfq.quantizers.base import QuantizedTensor
from gdfq.quantizers.family import LSQ
from gdfq.quantizers.lsq import LearnedWeight
from gdfq.quantizers.minmax import MinMaxWeight, MovingRange
from gdfq.sources.base import Batch
from gdfq.student.build import Student, StudentBatchNorm, build_student
from gdfq.student.freeze import freeze, rescaled
from gdfq.student.placement import activation_bits
from gdfq.student.scheme import LayerBits, Scheme
from gdfq.tuning.calibrate import calibrate_


def calibrated(teacher: Captured, bits: str, placement: str) -> Student:
    student = build_student(teacher, Scheme(Bits.parse(bits), placement))
    images = networks.images(64)
    logits = teacher.network(images)
    calibrate_(student, [Batch((images,), logits.argmax(1), logits)], steps=1)
    return student


def widths(name: str, placement: str) -> dict[str, int]:
    teacher = networks.captured(name)
    chosen = activation_bits(teacher, Scheme(Bits(3, 4), placement))
    return {node.name: bits for node, bits in chosen.items()}


def test_t1_quantizes_the_outputs_of_relus_only():
    assert widths("Residual", "relu") == {"relu": 4, "relu_1": 4}
    assert widths("Branches", "relu") == {"hardtanh": 4, "hardtanh_1": 4, "relu": 4}


def test_full_placement_of_a_residual_network():
    # Input 8; first ReLU 4; the second convolution's output, through its norm, 8 (it enters the
    # addition without a ReLU); the sum's ReLU 4 (it enters pooling); pooled features 4; no logits.
    assert widths("Residual", "full") == {
        "x": 8,
        "relu": 4,
        "batch_norm_1": 8,
        "relu_1": 4,
        "avg_pool2d": 4,
    }


def test_full_placement_of_branches():
    # Max pooling and padding keep the grid of what they move, so nothing follows them; the
    # concatenation joins two grids and is quantized again; "same" convolution feeds a ReLU.
    assert widths("Branches", "full") == {
        "x": 8,
        "hardtanh": 4,
        "hardtanh_1": 4,
        "batch_norm_1": 8,
        "cat": 4,
        "relu": 4,
        "adaptive_avg_pool2d": 4,
    }


def test_full_placement_with_squeeze_and_excitation():
    assert widths("Preactivation", "full") == {
        "relu": 4,  # the norm before it has no convolution to be folded into
        "batch_norm_1": 8,  # convolution → norm → SiLU: quantized before the SiLU
        "silu": 4,
        "mean": 4,
        "conv2d_1": 8,
        "sigmoid": 4,
        "mul": 4,
        "mean_1": 4,
        "relu_1": 4,
    }


@pytest.mark.parametrize("placement", ["relu", "full"])
def test_eight_bits_stay_close_and_the_frozen_form_equals_the_student(
    any_network, any_teacher, placement
):
    student = calibrated(any_teacher, "w8a8", placement)
    x = networks.images(64)
    expected, got = any_network(x).detach(), student(x).detach()
    assert float((got - expected).norm() / expected.norm()) < 0.05
    # Folding changes float rounding alone, which may move an activation by a step now and then.
    frozen = freeze(student)(x)
    assert float((frozen - got).norm() / got.norm()) < 0.01


@pytest.mark.parametrize("bits", ["w2a2", "w3a5", "w4a4"])
def test_frozen_weights_are_the_students_weights(any_teacher, bits):
    student = calibrated(any_teacher, bits, "relu")
    # With activations exact, folding must agree to float rounding.
    for quantizer in student.activations:
        quantizer.bits = 8
        quantizer.scale.fill_(1e-7)  # so fine that biases, too, are exact
        quantizer.forward = lambda x: x
    frozen = freeze(student)
    x = networks.images(16)
    assert torch.allclose(frozen.as_float()(x), student(x), rtol=1e-3, atol=1e-4)
    low, high = -(2 ** (int(bits[1]) - 1)), 2 ** (int(bits[1]) - 1) - 1
    codes = [t for n, t in frozen.named_buffers() if n.endswith("codes")]
    assert codes
    for tensor in codes:
        assert tensor.dtype == torch.int8
        assert low <= int(tensor.min()) <= int(tensor.max()) <= high


def test_each_channel_uses_its_whole_grid():
    quantized = MinMaxWeight(3, *_rows()).quantized(networks.make("Residual").conv1.weight)
    for channel in quantized.codes:
        assert int(channel.min()) == -4
        assert int(channel.max()) == 3


def _rows():
    from gdfq.functional.grid import Layout

    return (Layout.ROWS, 1)


def test_rescaling_keeps_codes_exact():
    codes = torch.tensor([[-8, 0, 7], [-8, 0, 7], [-8, 0, 7]], dtype=torch.int8)
    column = torch.tensor([[0.5], [0.5], [0.5]])
    tensor = QuantizedTensor(codes, column, torch.tensor([[-3.0], [-3.0], [2.0]]), 4)
    factor = torch.tensor([[2.0], [-2.0], [0.0]])
    new = rescaled(tensor, factor)
    values = dequantize(codes, tensor.scale, tensor.zero_point, 4) * factor
    assert torch.equal(dequantize(new.codes, new.scale, new.zero_point, 4), values)
    assert new.codes[1].tolist() == [7, -1, -8]
    assert (new.scale > 0).all()


def test_a_shared_convolution_gets_a_fold_for_each_norm():
    frozen = freeze(calibrated(networks.captured("Shared"), "w4a4", "relu"))
    names = [name for name, _ in frozen.named_buffers() if name.endswith(".codes")]
    assert len(names) == 4  # stem, conv twice, fc


def test_the_moving_range_by_hand():
    # Momentum 0.9, maxima 1 then 3: m1 = 0.1, tracked 1; m2 = 0.39, tracked 0.39/0.19.
    quantizer = MovingRange(4)
    quantizer.observe_(torch.tensor([0.0, 1.0]))
    assert float(quantizer.scale) * 15 == pytest.approx(1.0, rel=1e-6)
    quantizer.observe_(torch.tensor([0.5, 3.0]))
    assert float(quantizer.scale) * 15 == pytest.approx(0.39 / 0.19, rel=1e-5)
    assert float(quantizer.zero_point) == -8  # the range starts at 0


def test_a_constant_range_is_tracked_exactly_for_ever():
    quantizer = MovingRange(8)
    for _ in range(200):
        quantizer.observe_(torch.tensor([-1.0, 2.0]))
        assert float(quantizer.scale) * 255 == pytest.approx(3.0, rel=1e-4)


def test_ranges_contain_zero():
    quantizer = MovingRange(4)
    quantizer.observe_(torch.tensor([2.0, 3.0]))
    quantizer.observing = False
    assert float(quantizer(torch.tensor(0.0))) == 0
    assert float(quantizer(torch.tensor(9.0))) == pytest.approx(3.0)


def test_ranges_stay_once_calibration_is_over():
    student = calibrated(networks.captured("Residual"), "w4a4", "full")
    before = [float(q.scale) for q in student.activations]
    student(networks.images(8) * 100)
    assert [float(q.scale) for q in student.activations] == before


def test_freezing_an_uncalibrated_student_is_refused(teacher):
    with pytest.raises(GdfqError, match="Calibrate"):
        freeze(build_student(teacher, Scheme(Bits(4, 4), "relu")))


def test_statistics_are_fixed_unless_asked_otherwise(teacher):
    for fixed in (True, False):
        student = build_student(teacher, Scheme(Bits(4, 4), "relu"), fixed_statistics=fixed)
        norm = next(m for m in student.modules() if isinstance(m, StudentBatchNorm))
        before = norm.mean.clone()
        for quantizer in student.activations:
            quantizer.observing = True
        student.train()(networks.images(8))
        assert torch.equal(norm.mean, before) == fixed


def test_parameters_train_and_buffers_do_not(teacher):
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    names = {name for name, _ in student.named_parameters()}
    assert "network.conv1.weight" in names
    assert "network.student_batch_norm.batch_norm.weight" in names
    for tensor in teacher.network.parameters():
        assert not tensor.requires_grad


def test_there_must_be_something_to_quantize():
    smooth = nn.Sequential(nn.Conv2d(3, 5, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = capture(smooth, networks.images(1))
    with pytest.raises(UsageError, match="Use placement 'full'"):
        build_student(teacher, Scheme(Bits(4, 4), "relu"))
    build_student(teacher, Scheme(Bits(4, 4), "full"))
    empty = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="has none"):
        build_student(capture(empty, networks.images(1)), Scheme(Bits(4, 4), "relu"))


def test_a_network_that_normalises_inside_keeps_eight_bits_to_its_first_layer():
    chosen = widths("Awkward", "full")
    assert (chosen["x"], chosen["sub"], chosen["div"]) == (8, 8, 8)


def test_bare_matrices_are_quantized_as_the_linear_layers_that_they_are():
    frozen = freeze(calibrated(networks.captured("Awkward"), "w2a8", "relu"))
    codes = [name for name, _ in frozen.named_buffers() if name.endswith("codes")]
    assert len(codes) == 4  # convolution, product, linear with the same matrix, fc


def test_a_norm_without_affine_parameters_gets_none_to_train():
    student = build_student(networks.captured("Awkward"), Scheme(Bits(4, 4), "relu"))
    (norm,) = (m for m in student.modules() if isinstance(m, StudentBatchNorm))
    assert not list(norm.parameters())
    other = build_student(networks.captured("Residual"), Scheme(Bits(4, 4), "relu"))
    assert all(p.requires_grad for p in other.parameters())


def test_images_that_are_not_finite_are_refused(teacher):
    student = build_student(teacher, Scheme(Bits(4, 4), "relu"))
    images = networks.images(4)
    images[0, 0, 0, 0] = torch.nan
    batch = Batch((images,), torch.zeros(4, dtype=torch.long), torch.zeros(4, networks.CLASSES))
    with pytest.raises(GdfqError, match="must be finite"):
        calibrate_(student, [batch], steps=1)


def test_every_spelling_of_a_relu_is_one():
    spellings = (
        lambda x: x.clip(0, 6),
        lambda x: x.clamp(min=0),
        lambda x: nn.functional.relu6(x),
        lambda x: nn.functional.hardtanh(x, 0.0, 6.0),
    )

    class Net(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 5, 1), relu

        def forward(self, x):
            return self.relu(self.conv(x)).mean((2, 3))

    for relu in spellings:
        teacher = capture(Net(relu), networks.images(1))
        assert list(activation_bits(teacher, Scheme(Bits(4, 4), "relu")).values()) == [4]


def test_a_bias_that_depends_on_the_input_is_refused_at_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1, bias=False)

        def forward(self, x):
            return nn.functional.conv2d(x, self.conv.weight, x.mean().expand(5)).relu().mean((2, 3))

    teacher = capture(Net(), networks.images(1))
    with pytest.raises(UsageError, match="computed from the input"):
        build_student(teacher, Scheme(Bits(4, 4), "relu"))


def test_kept_layers_have_their_own_width_and_so_has_what_enters_them_alone():
    teacher = networks.captured("Residual")

    def widths(placement, *keep):
        scheme = Scheme(Bits(4, 4), placement, tuple(map(LayerBits.parse, keep)))
        return {n.name: bits for n, bits in activation_bits(teacher, scheme).items()}

    free = widths("full")
    assert free == {"x": 8, "relu": 4, "batch_norm_1": 8, "relu_1": 4, "avg_pool2d": 4}
    kept = widths("full", "conv1=float")
    assert kept == {name: bits for name, bits in free.items() if name != "x"}
    # conv2's input also enters the addition, the last layer's enters that alone.
    # conv2's input also enters the addition; the last layer's enters that alone.
    assert widths("full", "conv2=float", "last=8") == free | {"avg_pool2d": 8}
    assert widths("full", "last=3") == free  # never narrower than asked for
    assert widths("relu", "conv*=float") == {"relu": 4, "relu_1": 4}


def test_kept_layers_weights():
    teacher = networks.captured("Branches")
    keep = tuple(map(LayerBits.parse, ("first=float", "fc=8", "*=3")))
    student = build_student(teacher, Scheme(Bits(4, 4), "full", keep), quantizers=LSQ)
    bits = {
        name.rpartition(".")[2]: module.bits
        for name, module in student.named_modules()
        if isinstance(module, LearnedWeight)
    }
    assert bits == {"conv2d_1": 3, "conv2d_2": 3, "conv2d_3": 3, "linear": 8}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("convv=8", r"'convv' matches none of: conv1, conv2, fc"),
        ("*=float", "but those that stay float"),
        ("conv1", "PATTERN=BITS with 2..8 bits, or PATTERN=float"),
        ("conv1=9", "2..8 bits"),
        ("=8", "PATTERN=float"),
    ],
)
def test_what_cannot_be_kept(keep, message):
    teacher = networks.captured("Residual")
    with pytest.raises(UsageError, match=message):
        build_student(teacher, Scheme(Bits(4, 4), "full", (LayerBits.parse(keep),)))
