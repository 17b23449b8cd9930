"""Small valid files of every kind that gdfq reads."""

import io
import json
import os
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import fx, nn

from gdfq.data.class_names import ClassNames
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy import safetensors as packed
from gdfq.deploy.card import Card
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.files.states import to_bytes
from gdfq.functional.grid import Bits
from gdfq.graph import operators
from gdfq.graph.inputs import InputSpec
from gdfq.graph.tensors import flat_module
from gdfq.runs.metrics import EXPORT
from gdfq.runs.names import CONFIG, EVIDENCE, EVIDENCE_ARRAYS, EXAMPLES, HISTORY, METRICS, ONNX_FILE
from gdfq.student.integer_network import IntegerNetwork

SHAPE, CLASSES = (3, 8, 8), 5
CLASS_NAMES: ClassNames = tuple((f"class {index}", str(index)) for index in range(CLASSES))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, CLASSES)
    )


def student(class_names: ClassNames | None = None) -> bytes:
    """A small frozen network that is written by hand."""
    graph = fx.Graph()
    tensors = {
        "x.scale": torch.tensor(0.1),
        "x.zero_point": torch.tensor(0.0),
        "conv.codes": torch.arange(4 * 3 * 9, dtype=torch.int8)
        .remainder(16)
        .sub(8)
        .view(4, 3, 3, 3),
        "conv.scale": torch.full((4, 1, 1, 1), 0.02),
        "conv.zero_point": torch.zeros(4, 1, 1, 1),
        "fc.weight": torch.linspace(-1, 1, 4 * CLASSES).view(CLASSES, 4),
    }
    x = graph.placeholder("images")
    stored = {name: graph.get_attr(name) for name in tensors}

    def call(name: str, *args: Any) -> fx.Node:
        return graph.call_function(operators.resolve(name), args)

    x = call("gdfq.fake_quantize", x, stored["x.scale"], stored["x.zero_point"], 8)
    weight = [stored[f"conv.{name}"] for name in ("codes", "scale", "zero_point")]
    x = call("aten.conv2d.default", x, call("gdfq.dequantize", *weight, 4), None, [1, 1], [1, 1])
    x = call("aten.mean.dim", call("aten.relu.default", x), [2, 3])
    graph.output(call("aten.linear.default", x, stored["fc.weight"]))
    preprocessing = Preprocessing.of(3, [0.5] * 3, [0.2] * 3)
    card = Card(
        (InputSpec("images", SHAPE),), CLASSES, 0, preprocessing, Bits(4, 8), "full", "fast", 0,
        class_names=class_names,
    )  # fmt: skip
    return packed.to_safetensors(IntegerNetwork(flat_module(graph, tensors)), card)


def checkpoint() -> bytes:
    order = {"left": torch.arange(5), "epoch": 1, "packed": torch.arange(2**13) % 3}
    parts = {"student": network().state_dict(), "order": order}
    state = {"settings": {"seed": 0}, "around": {"torch": "2"}, "parts": parts}
    return to_bytes(state, lambda _: "")


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def images_npz() -> bytes:
    draw = np.random.default_rng(0)
    return npz(images=draw.integers(0, 256, (6, *SHAPE), np.uint8), labels=np.arange(6) % CLASSES)


def tokens_npz() -> bytes:
    draw = np.random.default_rng(0)
    return npz(tokens=draw.integers(0, 40, (6, 20), np.uint16))


def image_files() -> list[bytes]:
    draw = np.random.default_rng(0)
    found = []
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM"):
        for mode, channels in (("RGB", (3,)), ("L", ())):
            buffer = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (9, 12, *channels), np.uint8), mode).save(
                buffer, kind
            )
            found.append(buffer.getvalue())
    return found


class Trap:
    """Pickled code."""

    def __reduce__(self) -> Any:
        return os.system, ("touch trap",)


def torch_files(legacy: bool) -> list[bytes]:
    found = []
    state = network().state_dict()
    for value in (state, {"state_dict": state}, {**state, "trap": Trap()}):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
        found.append(buffer.getvalue())
    return found


def onnx_file() -> bytes:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], range(12))
    outside = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[4])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "b.bin"), ("offset", "0"), ("length", "16")):
        entry = outside.external_data.add()
        entry.key, entry.value = key, value
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    ends: list[tuple[str, list[str | int | None]]] = [("x", ["N", *SHAPE]), ("y", ["N", 4])]
    first, last = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in ends)
    graph = helper.make_graph(nodes, "g", [first], [last], [weight, outside])
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def run_files() -> dict[str, bytes]:
    metrics = {
        "teacher": {"top1": 90.0},
        "student": {"top1": 89.5},
        "seconds": {"total": 1.5},
        "steps": 8,
        EXPORT: {"sha256": "0" * 64, "path": ONNX_FILE},
    }
    return {
        CONFIG: json.dumps({"gdfq": "0.1.0", "recipe": {"class": "Recipe"}}).encode(),
        METRICS: json.dumps(metrics).encode(),
        EXAMPLES: npz(images=np.zeros((2, *SHAPE), np.uint8)),
        ONNX_FILE: onnx_file(),
        STUDENT_FILE: student(),
        HISTORY: b'{"stage": "tune", "step": 1, "loss": 0.5}\n' * 3,
        EVIDENCE: json.dumps({"version": 1, "layers": [{"name": "conv", "error": 0.1}]}).encode(),
        EVIDENCE_ARRAYS: npz(counts=np.arange(8), edges=np.linspace(0, 1, 9)),
    }
