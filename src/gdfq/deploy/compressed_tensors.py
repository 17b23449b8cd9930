"""The target `compressed-tensors`: a folder that transformers loads with its own code of the model.

It holds weights alone, in the names of the original: codes with a scale for each output channel or
group of columns. What enters a layer is rounded by the runtime, with a scale for each token.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gdfq.deploy.parity import FROM_EQUAL_CODES, Parity
from gdfq.deploy.safetensors import pack
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target, listed
from gdfq.errors import GdfqError, UsageError, first_line
from gdfq.functional.grid import UNROUNDED, block_size, code_bounds, dequantize
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.models.hugging_face import WEIGHTS_FILE, Skeleton, load_folder
from gdfq.models.language import NextToken
from gdfq.student.integer_network import IntegerLayer, IntegerNetwork, IntegerWeight
from gdfq.student.placement import layer_input_bits
from gdfq.student.scheme import Scheme

_NAME = "compressed-tensors"
_TOKEN_BITS = 8
"""Bits of activations that runtimes round by token."""
_WRAPPER = "model."
"""What captured names begin with: `models.language.NextToken` calls its model so."""
_WORD = 32
"""Codes of each row are packed into words of 32 bits."""


@dataclass(frozen=True)
class _Form:
    """How the layers of a folder store their weights and round what enters them."""

    bits: int
    group: int | None
    """Columns of a group; None for one scale an output channel."""
    token_bits: int | None
    """None where activations stay float."""

    @classmethod
    def of(cls, layer: IntegerLayer, weight: IntegerWeight) -> "_Form":
        rows_scales = weight.scale.shape[1]
        group = None if rows_scales == 1 else -(-weight.codes.shape[1] // rows_scales)
        return cls(weight.bits, group, layer.token_bits)

    @property
    def format(self) -> str:
        return "pack-quantized" if self.token_bits is None else "int-quantized"

    def scheme(self, targets: Sequence[str]) -> dict[str, Any]:
        """Return the scheme of layers of this form, as the configuration holds it."""
        usual = {"type": "int", "symmetric": True}
        strategy = "channel" if self.group is None else "group"
        rounding = {"num_bits": self.token_bits, "strategy": "token", "dynamic": True, **usual}
        return {
            "targets": list(targets),
            "weights": {
                "num_bits": self.bits,
                "strategy": strategy,
                "group_size": self.group,
                "dynamic": False,
                **usual,
            },
            "input_activations": None if self.token_bits is None else rounding,
            "output_activations": None,
            "format": self.format,
        }

    def stored(self, name: str, weight: IntegerWeight) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a layer's weight."""
        yield f"{name}.weight_scale", weight.scale.contiguous()
        if self.token_bits is not None:
            yield f"{name}.weight", weight.codes
        else:
            yield f"{name}.weight_packed", packed_rows(weight.codes, weight.bits)
            yield f"{name}.weight_shape", torch.tensor(weight.codes.shape)


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [O, I] row by row into int32 [O, ceil(I · bits / 32)], least significant first."""
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % _WORD), value=code_bounds(bits)[0])
    words = pack(padded, bits).view(torch.int32).view(rows, -1)
    return words[:, : -(-columns * bits // _WORD)].contiguous()


@dataclass(frozen=True, eq=False)
class _Folder:
    """The tensors of a folder, and its other files."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes]


def _folder(job: Job) -> _Folder:
    """Return the folder of an export.

    Raises:
        UsageError: There is no original, or its tensors are not those of the network.
    """
    if job.original is None:
        raise UsageError(
            f"target {_NAME!r} writes weights for the code of the original, of which it needs the "
            "configuration; none was named. Give the model, as --model hf:ID_OR_FOLDER "
            "(original='hf:...' in Python)."
        )
    skeleton = Skeleton.of(job.original)
    quantized = {_key(layer.weight.name): layer for layer in job.network.layers if layer.weight}
    tensors = _floats(job.network, skeleton, {f"{name}.weight" for name in quantized})
    forms: dict[_Form, list[str]] = {}
    for name, layer in quantized.items():
        assert layer.weight is not None
        if name not in skeleton.linear:
            raise UsageError(
                f"target {_NAME!r} quantizes linear layers alone; {name} of {job.original} is "
                "none. Use target 'safetensors'."
            )
        form = _Form.of(layer, layer.weight)
        forms.setdefault(form, []).append(name)
        tensors |= form.stored(name, layer.weight)
        if layer.bias is not None:
            tensors |= _bias(f"{name}.bias", layer.bias, skeleton)
    ties = skeleton.ties and skeleton.head not in tensors and _head(skeleton) not in quantized
    _check_tensors(skeleton, tensors, set(quantized), ties=ties, original=job.original)
    config = skeleton.config | {
        "dtype": "float32",
        "tie_word_embeddings": ties,
        "quantization_config": _quantization(forms, skeleton),
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return _Folder(tensors, {**skeleton.files, skeleton.config_file: text.encode()})


def _key(name: str) -> str:
    """Return the original's name of a captured tensor or layer."""
    return name.removeprefix(_WRAPPER)


def _head(skeleton: Skeleton) -> str:
    return skeleton.head.removesuffix(".weight")


def _floats(network: IntegerNetwork, skeleton: Skeleton, quantized: set[str]) -> dict[str, Tensor]:
    """Return the tensors that stay float, by the original's names.

    A capture calls an embedding that is the head, too, by the name of the head.
    """
    found = {_key(name): tensor for name, tensor in network.tensors.items()}
    kept = {name: t for name, t in found.items() if name in skeleton.shapes}
    for node in network.graph.nodes:
        if operators.name_of(node) == operators.EMBEDDING:
            table = _key(str(node.args[0].target))
            if table not in skeleton.shapes or table == skeleton.head:
                kept[skeleton.embedding] = found[table]
    kept = {name: tensor for name, tensor in kept.items() if name not in quantized}
    if skeleton.head in kept and kept[skeleton.head] is kept.get(skeleton.embedding):
        del kept[skeleton.head]
    for layer in network.layers:
        if layer.weight is None and layer.bias is not None:
            name = _key(queries.layer_name(layer.node))
            kept |= _bias(f"{name}.bias", layer.bias, skeleton)
    return kept


def _bias(name: str, bias: Tensor, skeleton: Skeleton) -> dict[str, Tensor]:
    """Return a layer's bias, if the original has one.

    Raises:
        UsageError: It has none, and this one is not 0.
    """
    if name in skeleton.shapes:
        return {name: bias.detach().contiguous()}
    if bool(bias.any()):
        raise UsageError(
            f"target {_NAME!r} has biases where the original has them; tuning gave the network "
            f"others, such as {name}. Quantize it again with --target {_NAME}."
        )
    return {}


def _check_tensors(
    skeleton: Skeleton,
    tensors: Mapping[str, Tensor],
    quantized: set[str],
    *,
    ties: bool,
    original: str,
) -> None:
    """Raise UsageError if a tensor of the original is missing, or has another shape."""
    stored = {f"{name}.weight" for name in quantized} | ({skeleton.head} if ties else set())
    wrong = [
        name
        for name, shape in skeleton.shapes.items()
        if name not in stored and (name not in tensors or tensors[name].shape != shape)
    ]
    if wrong:
        raise UsageError(
            f"each tensor of {original} must be one of the network, in its shape; these are not: "
            f"{listed(wrong)}. Name the model that the network was made from; if it is that, its "
            "code computes with these tensors before it uses them: use target 'safetensors'."
        )


def _quantization(forms: Mapping[_Form, Sequence[str]], skeleton: Skeleton) -> dict[str, Any]:
    """Return the configuration of the quantization: all linear layers, or groups by their names."""
    named = [name for names in forms.values() for name in names]
    formats = sorted({form.format for form in forms})
    alone = len(forms) == 1
    return {
        "quant_method": _NAME,
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": form.scheme(["Linear"] if alone else names)
            for i, (form, names) in enumerate(forms.items())
        },
        "ignore": [name for name in skeleton.linear if name not in named],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _write(job: Job) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in job.once(_folder).tensors.items()}
    return bytes(save(tensors, {"format": "pt"}))


def _beside(job: Job, _data: bytes) -> Mapping[str, bytes]:
    return job.once(_folder).files


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
        self.layers = {_key(layer.weight.name): layer for layer in network.layers if layer.weight}
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
def _prove(job: Job, written: Path) -> Proof:
    """Compare the folder in transformers with the network.

    Each quantized layer is compared from equal inputs, rounded with the runtime's scales; the
    logits without this rounding are compared, too. Both must be equal but for float rounding.
    """
    (tokens,) = job.examples
    with TemporaryDirectory() as place:
        for name, contents in job.once(_folder).files.items():
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


def _notes(job: Job, _data: bytes, _proof: Proof) -> Sequence[str]:
    if all(layer.token_bits is None for layer in job.network.layers):
        return []
    return [
        "transformers divides a token's largest value by 127.5, the student by 127; each layer is "
        "equal from equal inputs with that scale"
    ]


def _refusals(teacher: Captured, scheme: Scheme) -> Iterator[str]:
    """Yield what the folder cannot express of a language model that is to be quantized so."""
    if scheme.bits.activations not in (_TOKEN_BITS, UNROUNDED):
        yield f"activations of {scheme.bits.activations} bits (8, or 16 for float)"
    others = {bits for bits in layer_input_bits(teacher, scheme).values() if bits != _TOKEN_BITS}
    if others and scheme.bits.activations == _TOKEN_BITS:
        yield f"inputs of layers with {', '.join(map(str, sorted(others)))} bits"
    layers = scheme.weight_bits(list(filter(queries.has_weight, teacher.network.graph.nodes)))
    for layer in layers if scheme.group_size is not None else ():
        columns = queries.weight_of(layer).meta["val"].shape[1]
        assert scheme.group_size is not None
        size = block_size(columns, scheme.group_size)
        if columns % size:
            yield f"{queries.layer_name(layer)} (groups of {size} do not divide {columns} columns)"


def _misfits(network: IntegerNetwork) -> Iterator[str]:
    """Yield what the folder cannot express of a finished network."""
    for layer in network.layers:
        name = queries.layer_name(layer.node)
        if layer.token_bits not in (None, _TOKEN_BITS):
            yield f"{name} (inputs of {layer.token_bits} bits)"
        weight = layer.weight
        if weight is not None and weight.scale.shape[1] > 1:
            columns, groups = weight.codes.shape[1], weight.scale.shape[1]
            if columns % groups:
                yield f"{name} ({groups} groups of {columns} columns)"


def _unsupported(graph: fx.Graph) -> list[str]:
    return [
        f"{node.name} ({operators.short_name(node)})"
        for node in graph.nodes
        if operators.name_of(node) in {operators.ROTATED, operators.REASSEMBLED}
    ]


COMPRESSED_TENSORS = Target(
    _NAME,
    f".{_NAME}",
    "language models, for transformers: a folder that it loads",
    _write,
    _prove,
    _notes,
    runtime=Runtime("transformers", "compressed_tensors", "compressed-tensors"),
    weights=Carrier("packed at their true bits, or int8", symmetric=True),
    activations=Carrier("rounded by token", bits=(_TOKEN_BITS,)),
    placements=("tokens",),
    unsupported=_unsupported,
    equality="each layer from equal inputs, and the logits, in transformers",
    beside=_beside,
    holds_weights_alone=True,
    file_in_folder=WEIGHTS_FILE,
    refusals=_refusals,
    misfits=_misfits,
)
