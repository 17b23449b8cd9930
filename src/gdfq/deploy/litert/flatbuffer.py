"""A `.tflite` file: tensors and operators of one graph, packed as a flatbuffer.

The schema is that of the LiteRT package, which is imported when a file is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gdfq.errors import GdfqError, UsageError

_VERSION = 3
"""Version of the TensorFlow Lite schema."""
_ALIGNMENT_BYTES = 16
"""Alignment of constants that the schema asks for."""
_MAX_OLD_CODE = 127
"""Operators beyond it have no place in the byte that old readers look at."""

Array = np.ndarray[Any, Any]


def schema() -> Any:
    """Return the module of the schema's classes.

    Raises:
        UsageError: The LiteRT package is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise UsageError(
            "the target litert needs the LiteRT package; it is not installed. "
            "Install gdfq[litert], or ai-edge-litert."
        ) from error
    return schema_py_generated


@dataclass(frozen=True)
class Grid:
    """The numbers that the integers of a tensor stand for: scale (integer − zero point).

    With several scales they belong to the entries of one dimension, and the zero point is 0.
    """

    scales: tuple[float, ...]
    zero_point: int = 0
    dim: int = 0


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of the file.

    Attributes:
        index: Its index in the file.
        shape: Its shape; −1 stands for a length that grows with the batch.
        dtype: Its type.
        grid: What its integers stand for; None if they are the numbers themselves.
    """

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    grid: Grid | None = None


@dataclass(eq=False)
class FileBuilder:
    """Collects tensors and operators of a file.

    Attributes:
        batch: The batch that dynamic lengths stand for until an application sets another.
        is_dynamic: Whether an application can.
    """

    batch: int = 1
    is_dynamic: bool = True
    tensors: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    buffers: list[bytes] = field(default_factory=lambda: [b""])
    constants: dict[tuple[object, ...], FileTensor] = field(default_factory=dict)

    def tensor(
        self, name: str, shape: Sequence[int], dtype: Any, grid: Grid | None = None
    ) -> FileTensor:
        """Add a tensor that an operator writes, or an input."""
        return self._tensor(name, tuple(shape), np.dtype(dtype), grid, 0)

    def constant(self, name: str, value: Array, grid: Grid | None = None) -> FileTensor:
        """Add a constant, or return the one that is equal to it."""
        value = np.ascontiguousarray(value)
        key = (value.shape, value.dtype.str, grid, value.tobytes())
        if key not in self.constants:
            self.buffers.append(value.tobytes())
            self.constants[key] = self._tensor(
                name, value.shape, value.dtype, grid, len(self.buffers) - 1
            )
        return self.constants[key]

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        grid: Grid | None,
        buffer: int,
    ) -> FileTensor:
        lite = schema()
        made = lite.TensorT(
            shape=[self.batch if length < 0 else length for length in shape],
            type=getattr(lite.TensorType, dtype.name.upper()),
            buffer=buffer,
            name=name,
            hasRank=True,
        )
        if self.is_dynamic and any(length < 0 for length in shape):
            made.shapeSignature = list(shape)
        if grid is not None:
            count = len(grid.scales)
            made.quantization = lite.QuantizationParametersT(
                scale=list(grid.scales),
                zeroPoint=[grid.zero_point] * count,
                quantizedDimension=grid.dim,
            )
        self.tensors.append(made)
        return FileTensor(len(self.tensors) - 1, shape, dtype, grid)

    def operator(
        self,
        kind: str,
        inputs: Sequence[FileTensor | None],
        outputs: Sequence[FileTensor],
        options: str | None = None,
        **values: object,
    ) -> None:
        """Add an operator.

        Args:
            kind: Its name in the schema, such as `CONV_2D`.
            inputs: Its inputs; None for an optional one that is absent.
            outputs: Its outputs.
            options: The name of its options in the schema, such as `Conv2DOptions`.
            **values: The options.
        """
        lite = schema()
        code = getattr(lite.BuiltinOperator, kind)
        if code not in self.codes:
            self.codes.append(code)
        made = lite.OperatorT(
            opcodeIndex=self.codes.index(code),
            inputs=[-1 if tensor is None else tensor.index for tensor in inputs],
            outputs=[tensor.index for tensor in outputs],
        )
        if options is not None:
            made.builtinOptionsType = getattr(lite.BuiltinOptions, options)
            made.builtinOptions = getattr(lite, f"{options}T")(**values)
        self.operators.append(made)

    def pack(
        self,
        inputs: Mapping[str, FileTensor],
        outputs: Mapping[str, FileTensor],
        metadata: Mapping[str, str],
    ) -> bytes:
        """Return the file.

        Args:
            inputs: The inputs, by name and in order.
            outputs: The outputs, by name and in order.
            metadata: Entries of the file's metadata.
        """
        lite = schema()
        buffers = [*self.buffers, *(text.encode() for text in metadata.values())]
        graph = lite.SubGraphT(
            tensors=self.tensors,
            inputs=[tensor.index for tensor in inputs.values()],
            outputs=[tensor.index for tensor in outputs.values()],
            operators=self.operators,
            name="gdfq",
        )
        signature = lite.SignatureDefT(
            inputs=_named(lite, inputs), outputs=_named(lite, outputs), signatureKey=_SIGNATURE
        )
        model = lite.ModelT(
            version=_VERSION,
            operatorCodes=[
                lite.OperatorCodeT(
                    deprecatedBuiltinCode=min(code, _MAX_OLD_CODE), builtinCode=code, version=1
                )
                for code in self.codes
            ],
            subgraphs=[graph],
            description="gdfq",
            buffers=[_AlignedBuffer(data) for data in buffers],
            metadata=[
                lite.MetadataT(name=name, buffer=len(self.buffers) + index)
                for index, name in enumerate(metadata)
            ],
            signatureDefs=[signature],
        )
        return _packed(model, sum(map(len, buffers)))


_SIGNATURE = "serving_default"
"""The name under which converters write a network's one function."""


def _named(lite: Any, tensors: Mapping[str, FileTensor]) -> list[Any]:
    return [lite.TensorMapT(name=n, tensorIndex=t.index) for n, t in tensors.items()]


@dataclass(frozen=True, eq=False)
class _AlignedBuffer:
    """A buffer of the schema; the schema's own class does not align its data."""

    data: bytes

    def Pack(self, builder: Any) -> int:  # noqa: N802 (as the schema calls it)
        lite, start = schema(), None
        if self.data:
            builder.StartVector(1, len(self.data), _ALIGNMENT_BYTES)
            head = builder.head - len(self.data)
            builder.Bytes[head : builder.head] = self.data
            builder.head = head
            start = builder.EndVector()
        lite.BufferStart(builder)
        if start is not None:
            lite.BufferAddData(builder, start)
        return int(lite.BufferEnd(builder))


def with_outputs(data: bytes, names: Sequence[str]) -> bytes:
    """Return a file with some of its tensors as outputs, behind its own.

    Args:
        data: Contents of the file.
        names: Names of tensors that operators write.

    Raises:
        GdfqError: The file lacks a name.
    """
    lite = schema()
    model = lite.ModelT.InitFromPackedBuf(data)
    (graph,) = model.subgraphs
    indices = {tensor.name.decode(): index for index, tensor in enumerate(graph.tensors)}
    if missing := [name for name in names if name not in indices]:
        raise GdfqError(
            "an exported file must hold each activation's codes under their name, to compare them; "
            f"it has no {', '.join(map(repr, missing))}. Report the network."
        )
    outputs = list(graph.outputs)
    graph.outputs = [*outputs, *(indices[n] for n in names if indices[n] not in outputs)]
    model.signatureDefs = None
    model.buffers = [
        _AlignedBuffer(b"" if buffer.data is None else bytes(buffer.data))
        for buffer in model.buffers
    ]
    return _packed(model, len(data))


def _packed(model: Any, size: int) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(size + 2**16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
