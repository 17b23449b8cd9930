"""The target `compressed-tensors`: a folder that transformers loads with its own code of the model.

It holds weights alone, in the names of the original: codes with a scale for each output channel or
group of columns. What enters a layer is rounded by the runtime, with a scale for each token.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from gdfq.deploy.compressed_tensors.folder import NAME, folder_of
from gdfq.deploy.compressed_tensors.proof import prove
from gdfq.deploy.target import Carrier, Job, Proof, Runtime, Target
from gdfq.functional.grid import UNROUNDED, block_size
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.models.hugging_face import WEIGHTS_FILE
from gdfq.student.integer_network import IntegerNetwork
from gdfq.student.placement import layer_input_bits
from gdfq.student.scheme import Scheme

_TOKEN_BITS = 8
"""Bits of activations that runtimes round by token."""


def _write(job: Job) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in job.once(folder_of).tensors.items()}
    return bytes(save(tensors, {"format": "pt"}))


def _beside(job: Job, _data: bytes) -> Mapping[str, bytes]:
    return job.once(folder_of).files


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
    layers = scheme.weight_bits(queries.weighted_layers(teacher.network))
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
    NAME,
    f".{NAME}",
    "language models, for transformers: a folder that it loads",
    _write,
    prove,
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
