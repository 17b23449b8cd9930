"""Proof of a folder in transformers: each layer from equal inputs, and the logits."""

import io
import os
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdfq.deploy.compressed_tensors.folder import folder_of, original_name
from gdfq.deploy.parity import FROM_EQUAL_CODES, Parity
from gdfq.deploy.target import Job, Proof, listed
from gdfq.errors import GdfqError, first_line
from gdfq.functional.grid import code_bounds, dequantize
from gdfq.models.hugging_face import WEIGHTS_FILE, load_folder
from gdfq.models.language import NextToken
from gdfq.student.integer_network import IntegerNetwork


def rounded_by_runtime(x: Tensor, bits: int) -> Tensor:
    """Return tokens rounded as compressed-tensors does: Δ = max|x| / (2^k − 1) · 2.

    The student divides by half the codes without the lowest one (`fake_quantize_tokens`).
    """
    low, high = code_bounds(bits)
    scale = x.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).round().clamp(low, high) * scale


class _Layers:
    """Hooks on the quantized layers of a loaded model, which compare each from equal inputs.

    The smallest difference before a rounding grows to one of its size within some layers, so that
    logits alone would tell little.
    """

    def __init__(self, network: IntegerNetwork, model: nn.Module) -> None:
        self.errors: dict[str, float] = {}
        self.layers = {
            original_name(layer.weight.name): layer for layer in network.layers if layer.weight
        }
        self.modules = {name: model.get_submodule(name) for name in self.layers}
        self.hooks = [
            module.register_forward_hook(partial(self._compare, name))
            for name, module in self.modules.items()
        ]

    def _compare(
        self, name: str, _module: nn.Module, inputs: tuple[Tensor], actual: Tensor
    ) -> None:
        layer, (x,) = self.layers[name], inputs
        assert layer.weight is not None
        found = layer.weight
        weight = dequantize(found.codes, found.scale, found.zero_point, found.bits)
        if layer.token_bits is not None:
            x = rounded_by_runtime(x, layer.token_bits)
        expected = F.linear(x, weight, layer.bias)
        self.errors[name] = Parity.of([expected], [actual], classes=False).relative_error

    def stop_rounding_(self) -> None:
        """Remove the hooks, and let tokens enter the layers as they are."""
        for hook in self.hooks:
            hook.remove()
        for module in self.modules.values():
            vars(module)["quantization_enabled"] = False  # which the library asks of its modules


@torch.no_grad()
def prove(job: Job, written: Path) -> Proof:
    """Compare the folder in transformers with the network.

    Each quantized layer is compared from equal inputs, rounded with the runtime's scales; the
    logits without this rounding are compared, too. Both must be equal but for float rounding.
    """
    (tokens,) = job.examples
    with TemporaryDirectory() as place:
        for name, contents in job.once(folder_of).files.items():
            (Path(place) / name).write_bytes(contents)
        os.symlink(written.resolve(), Path(place) / WEIGHTS_FILE)
        try:
            with redirect_stderr(io.StringIO()):  # compressed-tensors shows bars of its own
                model = load_folder(Path(place))
                predict = NextToken(model)
                predict(tokens)  # the first call unpacks the weights
                layers = _Layers(job.network, model)
                actual = predict(tokens)
                layers.stop_rounding_()
                unrounded = predict(tokens)
        except Exception as error:  # of transformers and what it calls
            raise GdfqError(
                f"transformers must load the folder {job.path.parent}; it says: "
                f"{first_line(error)}. It was not kept; report the model."
            ) from error
    floats = Parity.of(job.network.as_float().outputs(tokens), [unrounded], classes=False)
    wrong = [name for name, error in layers.errors.items() if not error <= FROM_EQUAL_CODES]
    if wrong or not floats.relative_error <= FROM_EQUAL_CODES:
        raise GdfqError(
            "a folder must compute the network's layers from equal inputs, and its logits without "
            f"the rounding of tokens; these are {floats}, and the layers that differ are: "
            f"{listed(wrong) or 'none'}. It was not kept; report the model."
        )
    found = Parity.of(job.network.outputs(tokens), [actual], classes=False)
    return Proof(found, found)
