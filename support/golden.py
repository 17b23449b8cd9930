"""Golden values: hashes of what runs produce, to prove that a change of the code changed no number.

    python -m support.golden FILE [--only NAME ...]     # write golden.json with the present values

A hash stands for the tensors of a student in any order and under any names, for the graph of an
ONNX file without its metadata, or for images. The numbers depend on the processor and on torch's
kernels: `golden.json` has a set of values for each kind of processor, by the hash of a network that
was trained on it (`Digits.probe`). What is written is `golden.json` with the new values of the
processor that wrote it.
"""

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file
from support.places import SHARED
from support.real_networks import cifar10_resnet20
from torch import Tensor, nn

import gdfq
from gdfq import demo


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors, whatever their order and names."""
    parts = []
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        head = f"{value.dtype} {list(value.shape)} ".encode()
        parts.append(hashlib.sha256(head + value.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def student_of(result: Any) -> str:
    unique = {id(t): t for t in (*result.parameters(), *result.buffers())}
    return digest_of(unique.values())


def onnx_of(result: Any, folder: Path, name: str = "student.onnx") -> str:
    path = folder / name
    result.export(path)
    graph = onnx.load(path).graph
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:16]


class Digits:
    """The demonstration's network, and quick calls on it."""

    shape = demo.INPUT_SHAPE

    def __init__(self) -> None:
        training, self.test = demo.load_digits()
        self.network = demo.train(training, epochs=10)
        self.example = torch.zeros(1, *self.shape)

    def probe(self) -> str:
        with torch.no_grad():
            logits = self.network(demo.PREPROCESSING(self.test.images))
        return digest_of([logits, *self.network.parameters()])

    def quantize(self, bits: str, recipe: Any, **options: Any) -> Any:
        mean, std = demo.PREPROCESSING.mean, demo.PREPROCESSING.std
        return gdfq.quantize(
            self.network, self.example, bits, recipe, mean=mean, std=std, **options
        )


def _has_field(value: Any, name: str) -> bool:
    return name in {field.name for field in fields(value)}


def _small(name: str, steps: int, *, images: int = 64, batch: int = 16, iterations: int = 6) -> Any:
    """A recipe with a small pool and few steps."""
    recipe: Any = gdfq.RECIPES[name]
    source: Any = recipe.source
    if hasattr(source, "source"):
        inner = replace(source.source, batch=batch)
        if _has_field(inner, "iterations"):
            inner = replace(inner, iterations=iterations)
        source = replace(source, source=inner, images=images, batch=batch)
    else:
        source = replace(source, batch=batch)
        if _has_field(source, "iterations"):
            source = replace(source, iterations=iterations)
    tuning: Any = recipe.tuning
    if hasattr(tuning, "images"):
        recipe = replace(recipe, tuning=replace(tuning, images=images))
    return replace(recipe, source=source).with_steps(steps)


class _StopError(Exception):
    pass


def _resumed(digits: Digits, recipe: Any) -> Any:
    """A run that is stopped in its tuning and resumed."""

    def stop(step: Any) -> None:
        if step.stage == "tune" and step.index >= 9:
            raise _StopError

    with tempfile.TemporaryDirectory() as folder:
        try:
            digits.quantize("w4a4", recipe, checkpoints=folder, listener=stop)
        except _StopError:
            return digits.quantize("w4a4", recipe, checkpoints=folder)
    raise AssertionError("the run was to be stopped")


RECORDED = Path(__file__).with_name("golden.json")


def recorded() -> dict[str, dict[str, str]]:
    """The values of `golden.json`, by name, for each kind of processor by its probe."""
    values: dict[str, dict[str, str]] = json.loads(RECORDED.read_text())
    return values


def digits_values(digits: Digits, only: set[str] | None = None) -> dict[str, str]:
    """The golden values of runs on the digits network, by name."""
    cases: dict[str, Callable[[], Any]] = {
        "quick-w4a4-full-0": lambda: digits.quantize("w4a4", _small("quick", 16)),
        "quick-w8a8-full-1": lambda: digits.quantize("w8a8", _small("quick", 12), seed=1),
        "quick-w3a3-relu-0": lambda: digits.quantize("w3a3", _small("quick", 12), placement="relu"),
        "quick-w2a4-layers-2": lambda: digits.quantize(
            "w2a4", _small("quick", 12), seed=2, layer_bits=["first=8", "last=float"]
        ),
        "quick-auto-0": lambda: digits.quantize("auto", _small("quick", 12), size=24_000),
        "quick-resumed-0": lambda: _resumed(digits, _small("quick", 16)),
        "paper-w4a4-relu-0": lambda: digits.quantize("w4a4", _small("paper", 40)),
        "paper-follows-w4a4-0": lambda: digits.quantize(
            "w4a4", _small("paper-moving-statistics", 12)
        ),
        "imagenet-w4a4-0": lambda: digits.quantize("w4a4", _small("paper-imagenet", 12)),
        "round-w4a4-0": lambda: digits.quantize("w4a4", _small("round", 8)),
        "zeroq-w4a4-0": lambda: digits.quantize("w4a4", _small("zeroq", 1)),
        "genie-w3a3-0": lambda: digits.quantize("w3a3", _small("genie", 10)),
        "synq-w4a4-0": lambda: digits.quantize("w4a4", _small("synq", 12)),
        "patches-w4a4-0": lambda: digits.quantize("w4a4", _small("patches", 12)),
        "real-w4a4-0": lambda: digits.quantize(
            "w4a4", _small("real", 12), data=digits.test.images[:64]
        ),
    }
    values = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in cases.items():
            if only is not None and name not in only:
                continue
            result = make()
            values[name] = student_of(result)
            if name.startswith(("quick", "genie")):
                values[f"{name}.onnx"] = onnx_of(result, Path(folder))
        images, labels = gdfq.generate(digits.network, digits.example, 48, _small("fast", 12))
        assert labels is not None
        values["images"] = digest_of([images, labels])
    return values


def shared_values() -> dict[str, str]:
    """The golden values of short runs of `fast` on the real ResNet-20."""
    network: nn.Module = cifar10_resnet20().eval()
    network.load_state_dict(load_file(SHARED / "models" / "cifar10_resnet20.safetensors"))
    recipe = _small("fast", 20, images=32, batch=8, iterations=8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    example = torch.zeros(1, 3, 32, 32)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        for bits, placement in (("w4a4", "full"), ("w3a3", "relu"), ("w4a8", "full")):
            result = gdfq.quantize(
                network, example, bits, recipe, placement=placement, mean=mean, std=std
            )
            name = f"resnet20-fast-{bits}-{placement}"
            values[name] = student_of(result)
            values[f"{name}.onnx"] = onnx_of(result, Path(folder))
    images, labels = gdfq.generate(network, example, 32, recipe)
    assert labels is not None
    return values | {"resnet20-images": digest_of([images, labels])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits, known = Digits(), recorded()
    values = digits_values(digits, set(arguments.only) if arguments.only else None)
    if SHARED.is_dir() and not arguments.only:
        values |= shared_values()
    known[digits.probe()] = known.get(digits.probe(), {}) | values
    arguments.file.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
