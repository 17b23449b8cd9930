"""The folder of a network in the format compressed-tensors: codes in the names of the original."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfq.deploy.safetensors import pack
from gdfq.deploy.target import Job, listed
from gdfq.errors import UsageError
from gdfq.functional.grid import code_bounds
from gdfq.graph import operators, queries
from gdfq.models.hugging_face import Skeleton
from gdfq.student.integer_network import IntegerLayer, IntegerNetwork, IntegerWeight

NAME = "compressed-tensors"
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
class Folder:
    """The tensors of a folder, and its other files."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes]


def folder_of(job: Job) -> Folder:
    """Return the folder of an export.

    Raises:
        UsageError: There is no original, or its tensors are not those of the network.
    """
    if job.original is None:
        raise UsageError(
            f"target {NAME!r} writes weights for the code of the original, of which it needs the "
            "configuration; none was named. Give the model, as --model hf:ID_OR_FOLDER "
            "(original='hf:...' in Python)."
        )
    skeleton = Skeleton.of(job.original)
    quantized = {
        original_name(layer.weight.name): layer for layer in job.network.layers if layer.weight
    }
    tensors = _floats(job.network, skeleton, {f"{name}.weight" for name in quantized})
    forms: dict[_Form, list[str]] = {}
    for name, layer in quantized.items():
        assert layer.weight is not None
        if name not in skeleton.linear:
            raise UsageError(
                f"target {NAME!r} quantizes linear layers alone; {name} of {job.original} is "
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
    return Folder(tensors, {**skeleton.files, skeleton.config_file: text.encode()})


def original_name(name: str) -> str:
    """Return the original's name of a captured tensor or layer."""
    return name.removeprefix(_WRAPPER)


def _head(skeleton: Skeleton) -> str:
    return skeleton.head.removesuffix(".weight")


def _floats(network: IntegerNetwork, skeleton: Skeleton, quantized: set[str]) -> dict[str, Tensor]:
    """Return the tensors that stay float, by the original's names.

    A capture calls an embedding that is the head, too, by the name of the head.
    """
    found = {original_name(name): tensor for name, tensor in network.tensors.items()}
    kept = {name: t for name, t in found.items() if name in skeleton.shapes}
    for node in network.graph.nodes:
        if operators.name_of(node) == operators.EMBEDDING:
            table = original_name(str(node.args[0].target))
            if table not in skeleton.shapes or table == skeleton.head:
                kept[skeleton.embedding] = found[table]
    kept = {name: tensor for name, tensor in kept.items() if name not in quantized}
    if skeleton.head in kept and kept[skeleton.head] is kept.get(skeleton.embedding):
        del kept[skeleton.head]
    for layer in network.layers:
        if layer.weight is None and layer.bias is not None:
            name = original_name(queries.layer_name(layer.node))
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
            f"target {NAME!r} has biases where the original has them; tuning gave the network "
            f"others, such as {name}. Quantize it again with --target {NAME}."
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
        "quant_method": NAME,
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
