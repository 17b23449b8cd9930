"""Sony's model-compression-toolkit as a rival: its generated images, its quantization.

An optional extra in a folder of its own, because its matplotlib is older than ours:

    pip install --target DIR "numpy<2.4" scipy scikit-image scikit-learn PuLP protobuf \
        tensorboard "networkx<3.6" "matplotlib<3.10" "pydantic<2.12"
    pip install --target DIR --no-deps "model-compression-toolkit==2.6.1" \
        "mct-quantizers~=1.7.0" "edge-mdt-cl~=1.1.0" torchvision
    PYTHONPATH=DIR python -m benchmarks.accuracy --recipes mct

The bits are placed as in `relu`: all weights for each output channel, of the activations the
outputs of ReLUs alone.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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


def quantized(
    model: nn.Module, shape: tuple[int, int, int], weights: int, activations: int, seed: int
) -> tuple[Callable[[Tensor], Tensor], dict[str, float]]:
    """The network that the toolkit makes of a float one, and the seconds of its two stages."""
    import model_compression_toolkit as mct

    torch.manual_seed(seed)
    started = time.perf_counter()
    generation = mct.data_generation.get_pytorch_data_generation_config(
        n_iter=ITERATIONS, data_gen_batch_size=128
    )
    images = mct.data_generation.pytorch_data_generation_experimental(
        model=copy.deepcopy(model),
        n_images=IMAGES,
        output_image_size=shape[1:],
        data_generation_config=generation,
    )
    images = torch.cat([image.reshape(-1, *shape) for image in images]).detach()
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
