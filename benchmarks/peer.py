"""Sony's model-compression-toolkit as a rival: its generated images, its quantization.

An optional extra in a folder of its own, because its matplotlib is older than ours:

    pip install --target DIR "numpy<2.4" scipy scikit-image scikit-learn PuLP protobuf \
        tensorboard tqdm "networkx<3.6" "matplotlib<3.10" "pydantic<2.12"
    pip install --target DIR --no-deps "model-compression-toolkit==2.6.1" \
        "mct-quantizers~=1.7.0" "edge-mdt-cl~=1.1.0" torchvision
    PYTHONPATH=DIR python -m benchmarks.accuracy --recipes mct

`quantized` is its gradient-based quantization with the bits placed as in `relu`: all weights for
each output channel, of the activations the outputs of ReLUs alone. `calibrated` is its post-training
quantization with the toolkit's own default target: all weights and activations at 8 bits.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.data.preprocessing import Preprocessing

IMAGES = 512
ITERATIONS = 200
EPOCHS = 40


def why_absent() -> str | None:
    """Why the toolkit cannot be imported; None if it can."""
    _operators_of_torchvision()
    try:
        import model_compression_toolkit  # noqa: F401
    except Exception as error:  # it raises errors of its own where a library is missing
        return f"model-compression-toolkit does not import ({error}); see benchmarks/peer.py"
    return None


def generated(
    model: nn.Module,
    shape: tuple[int, int, int],
    count: int,
    iterations: int,
    *,
    batch: int = 128,
    preprocessing: Preprocessing | None = None,
) -> Tensor:
    """Images [count, *shape] that the toolkit makes of a network.

    It knows two normalisations of pixels. Of these it takes the nearer one, or without
    `preprocessing` the one of ImageNet.
    """
    import model_compression_toolkit as mct
    from model_compression_toolkit.data_generation import ImageNormalizationType

    centred = preprocessing is not None and max(abs(m - 0.5) for m in preprocessing.mean) < 0.01
    config = mct.data_generation.get_pytorch_data_generation_config(
        n_iter=iterations,
        data_gen_batch_size=batch,
        image_normalization_type=(
            ImageNormalizationType.KERAS_APPLICATIONS
            if centred
            else ImageNormalizationType.TORCHVISION
        ),
    )
    images = mct.data_generation.pytorch_data_generation_experimental(
        model=copy.deepcopy(model),
        n_images=count,
        output_image_size=shape[1:],
        data_generation_config=config,
    )
    return torch.cat([image.reshape(-1, *shape) for image in images]).detach()


def calibrated(model: nn.Module, images: Tensor, batch: int = 32) -> nn.Module:
    """The network that the toolkit calibrates on images [N, *shape], for its default target."""
    import model_compression_toolkit as mct

    def batches() -> Iterator[list[Tensor]]:
        for part in images.split(batch):
            yield [part]

    student, _ = mct.ptq.pytorch_post_training_quantization(copy.deepcopy(model), batches)
    found: nn.Module = student.eval()
    return found


def with_plain_convolutions(model: nn.Module) -> nn.Module:
    """A copy whose padded convolutions of EfficientNet-Lite are a padding and a plain convolution.

    The toolkit only folds batch norms into convolutions of torch's own class.
    """
    model = copy.deepcopy(model)
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
                paddings = [inner for inner in child.children() if isinstance(inner, nn.ZeroPad2d)]
                setattr(parent, name, nn.Sequential(*paddings, _plain(child)).eval())
    return model


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """The convolution of torch's own class with the settings and weights of a layer."""
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.weight.shape[2:],  # type: ignore[arg-type]  # a torch.Size of two sides
        tuple(layer.stride),  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        layer.bias is not None,
    )
    plain.load_state_dict(layer.state_dict())
    return plain


def quantized(
    model: nn.Module, shape: tuple[int, int, int], weights: int, activations: int, seed: int
) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    """The network that the toolkit makes of a float one, and the seconds of its two stages."""
    import model_compression_toolkit as mct

    torch.manual_seed(seed)
    started = time.perf_counter()
    images = generated(model, shape, IMAGES, ITERATIONS)
    made = time.perf_counter() - started

    def batches() -> Iterator[list[Tensor]]:
        for batch in images.split(64):
            yield [batch]

    started = time.perf_counter()
    student, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        copy.deepcopy(model),
        batches,
        gptq_config=mct.gptq.get_pytorch_gptq_config(n_epochs=EPOCHS),
        target_platform_capabilities=_capabilities(weights, activations),
    )
    student.eval()
    return student, {"images": made, "student": time.perf_counter() - started}


def _capabilities(weights: int, activations: int) -> Any:
    """`relu` in the toolkit's words."""
    import model_compression_toolkit.target_platform_capabilities.schema.mct_current_schema as schema
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import (
        BIAS_ATTR,
        KERNEL_ATTR,
    )

    def attribute(bits: int, on: bool) -> object:
        return schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=bits,
            weights_per_channel_threshold=True,
            enable_weights_quantization=on,
            lut_values_bitwidth=None,
        )

    def options(bits: int, on: bool, kernel: bool) -> object:
        kinds = {KERNEL_ATTR: attribute(weights, True), BIAS_ATTR: attribute(32, False)}
        return schema.QuantizationConfigOptions(
            quantization_configurations=(
                schema.OpQuantizationConfig(
                    default_weight_attr_config=attribute(8, False),
                    attr_weights_configs_mapping=kinds if kernel else {},
                    activation_quantization_method=QuantizationMethod.UNIFORM,
                    activation_n_bits=bits,
                    supported_input_activation_n_bits=(2, 3, 4, 5, 6, 7, 8, 16),
                    enable_activation_quantization=on,
                    quantization_preserving=False,
                    fixed_scale=None,
                    fixed_zero_point=None,
                    simd_size=32,
                    signedness=schema.Signedness.AUTO,
                ),
            )
        )

    names = schema.OperatorSetNames
    layers = (names.CONV, names.DEPTHWISE_CONV, names.CONV_TRANSPOSE, names.FULLY_CONNECTED)
    sets = [schema.OperatorsSet(name=n, qc_options=options(8, False, True)) for n in layers]
    sets.append(schema.OperatorsSet(name=names.RELU, qc_options=options(activations, True, False)))
    return schema.TargetPlatformCapabilities(
        default_qco=options(8, False, False),
        tpc_minor_version=1,
        tpc_patch_version=0,
        tpc_platform_type="relu",
        operator_set=tuple(sets),
        fusing_patterns=(),
        add_metadata=False,
        name="relu",
    )


def _operators_of_torchvision() -> None:
    """torchvision imports only where these operators are known, which CPU builds may lack."""
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        name = f"torchvision::{schema.partition('(')[0]}"
        try:
            torch.library.define(name, schema[schema.index("(") :])
        except RuntimeError:  # known already
            continue
