"""Each kind of source, quantizer and tuning, and whole runs, on a simulated GPU.

A new kind is found by itself, and a kind without an example here fails. Not covered: collective
operations between GPUs (`gdfq.execution.distributed` calls NCCL), and what a GPU rounds otherwise.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import language_model, multi_input, networks, unusual
from support.choice import checked, every_second
from support.denoisers import SHAPE, tiny_denoiser
from support.plain_scheduler import PlainConfig
from support.simulated_gpu import GPU, GpuTensor, simulated_gpu, values_of
from torch import Tensor, nn

import gdfq
import gdfq.quantizers
import gdfq.sources
import gdfq.tuning
from gdfq.analysis.cost import with_costs
from gdfq.analysis.preflight import diagnose
from gdfq.data.datasets import ArrayData
from gdfq.data.preprocessing import Preprocessing
from gdfq.diffusion.sampler import Sampler
from gdfq.execution.context import Context
from gdfq.execution.distributed import Group
from gdfq.execution.progress import Step
from gdfq.files.states import Frozen, from_bytes, to_bytes
from gdfq.functional.float_grid import formats_of
from gdfq.functional.grid import Bits, Layout
from gdfq.graph.capture import Captured, capture
from gdfq.graph.outputs import in_order
from gdfq.plan.denoiser import captured_denoiser
from gdfq.quantizers import family
from gdfq.quantizers.family import LSQ, QuantizerFamily
from gdfq.recipes import RECIPES, Recipe
from gdfq.runs.diagnostics import gather
from gdfq.sources.augment import prediction_consistency, shifted_and_flipped
from gdfq.sources.base import Batch, Source
from gdfq.sources.collapse import symptom_of
from gdfq.sources.given import GivenImages, ImageSource
from gdfq.sources.pool import StoredImages
from gdfq.sources.stream import Feed, InTurn
from gdfq.sources.trajectories import TrajectorySource
from gdfq.student.build import build_student
from gdfq.student.freeze import freeze
from gdfq.student.scheme import Scheme
from gdfq.tuning.base import NoTuning, Tuning
from gdfq.tuning.calibrate import calibrate_


def concrete(kind: type, package: Any) -> list[type]:
    """All classes of a package that derive from a class, except protocols."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found: list[type] = []
    waiting = [kind]
    while waiting:
        below: list[type] = waiting.pop().__subclasses__()
        waiting += below
        found += [cls for cls in below if cls.__module__.startswith(f"{package.__name__}.")]
    return sorted(set(found), key=lambda cls: cls.__name__)


def small(value: Any) -> Any:
    """A source or tuning with few images and iterations."""
    sizes = {"batch": 8, "images": 16, "sequences": 16, "iterations": 2, "pixels": None}
    names = {field.name for field in fields(value)}
    changes: dict[str, Any] = {
        name: size for name, size in sizes.items() if name in names and isinstance(getattr(value, name), int)
    }  # fmt: skip
    if "source" in names:
        changes["source"] = small(value.source)
    return replace(value, **changes)


def small_recipe(recipe: Recipe, steps: int = 8) -> Recipe:
    source, tuning = small(recipe.source), recipe.tuning
    tuning = small(tuning) if hasattr(tuning, "images") else tuning
    return replace(recipe, source=source, tuning=tuning).with_steps(steps)


def on_gpu(teacher: Captured) -> Captured:
    """A copy on the GPU: a move changes the network itself."""
    return replace(teacher, network=deepcopy(teacher.network)).to(GPU)


def teacher_for(source: Source) -> Captured:
    inner = getattr(source, "source", source)
    if source.makes_text:
        return language_model.captured_model()
    if isinstance(source, TrajectorySource):
        return captured_denoiser(tiny_denoiser(), source.sampler)
    return networks.captured("Transformer" if type(inner).__name__ == "PatchSource" else "Residual")


def _sources() -> dict[type, Source]:
    """An example of each kind of source that makes batches."""
    pixels = torch.randint(0, 256, (20, *networks.SHAPE), dtype=torch.uint8)
    found: dict[type, Source] = {
        ImageSource: ImageSource(ArrayData(pixels, None), Preprocessing((0.5,) * 3, (0.3,) * 3), 8),
        StoredImages: StoredImages(networks.images(20), torch.arange(20) % 5, 8),
        TrajectorySource: TrajectorySource(Sampler(PlainConfig(noise=0.1), SHAPE, 3), 8),
    }  # fmt: skip
    for recipe in RECIPES.values():
        for source in (recipe.source, getattr(recipe.source, "source", recipe.source)):
            if GivenImages not in {type(source), type(getattr(source, "source", None))}:
                found.setdefault(type(source), small(source))
    return found


SOURCES = _sources()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inside in value.values():
            yield from tensors_in(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from tensors_in(inside)


def reread(state: Any) -> Any:
    """A state as a checkpoint returns it: on the CPU."""
    frozen: list[bytes] = []

    def named(part: Frozen) -> str:
        frozen.append(to_bytes(part.value, named))
        return str(len(frozen) - 1)

    def read(name: str) -> Frozen:
        return Frozen(from_bytes(frozen[int(name)], read))

    return from_bytes(to_bytes(state, named), read)


def check_batch(batch: Batch) -> None:
    tensors = [*batch.inputs, batch.labels, batch.teacher_logits, *batch.losses.values()]
    for tensor in tensors:
        assert tensor is None or isinstance(tensor, GpuTensor)


def test_all_sources_have_an_example() -> None:
    assert {*concrete(Source, gdfq.sources)} == {*SOURCES, GivenImages}


@pytest.mark.parametrize("precision", [checked("float32"), "bfloat16"])
@pytest.mark.parametrize("kind", SOURCES, ids=lambda kind: kind.__name__)
def test_source_makes_and_resumes_its_batches_on_a_gpu(kind: type, precision: Any) -> None:
    """A state that was read from a file is on the CPU."""
    source, context = SOURCES[kind], Context(seed=1, precision=precision)
    with simulated_gpu():
        teacher = on_gpu(teacher_for(source))
        if isinstance(source, StoredImages):
            source = replace(source, images=source.images.to(GPU), labels=source.labels.to(GPU))  # type: ignore[union-attr]

        def feed() -> Feed:
            return Feed(source.stream(teacher, steps=3, context=context), teacher.device)

        first, resumed = feed(), feed()
        for batch in first.until(1):
            check_batch(batch)
        resumed.load_state_dict(reread(first.state_dict()))
        for batch, again in zip(first.until(3), resumed.until(3), strict=True):
            for one in (batch, again):
                check_batch(one)
                assert one.inputs[0].dtype == (torch.int64 if source.makes_text else torch.float32)
                assert all(loss.dtype == torch.float32 for loss in one.losses.values())
            assert values_of(batch.inputs[0]).equal(values_of(again.inputs[0]))


class _Two(Group):
    """The first of two processes; the other one sends the same."""

    rank, size = 0, 2


@pytest.mark.usefixtures("gpu")
def test_images_of_other_processes_are_on_the_gpu_after_a_stop() -> None:
    def made() -> InTurn[Tensor]:
        draw = torch.Generator().manual_seed(0)
        return InTurn(
            lambda: torch.randn(2, generator=draw).to(GPU), lambda _, x: x, 4, _Two(), GPU
        )

    first, resumed = made(), made()
    first(0)
    resumed.load_state_dict(reread(first.state_dict()))
    assert isinstance(resumed(1), GpuTensor)


@pytest.mark.usefixtures("gpu")
def test_augmentation_and_collapse_on_a_gpu() -> None:
    teacher, draw = on_gpu(networks.captured("Residual")), torch.Generator().manual_seed(0)
    images = networks.images(16).to(GPU)
    assert isinstance(shifted_and_flipped(images, draw), GpuTensor)
    assert isinstance(prediction_consistency(teacher, images, draw), GpuTensor)
    labels = torch.arange(16, device=GPU) % 5
    assert symptom_of(images, torch.eye(5, device=GPU)[labels], labels) is None
    assert symptom_of(images, torch.eye(5, device=GPU)[torch.zeros_like(labels)], labels)


FAMILIES = [value for value in vars(family).values() if isinstance(value, QuantizerFamily)]


@pytest.mark.parametrize(
    "layout", [(Layout.ROWS, 1), (Layout.TRANSPOSED, 2)], ids=["rows", "transposed"]
)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("chosen", FAMILIES, ids=lambda value: value.name)
@pytest.mark.usefixtures("gpu")
def test_weight_quantizer_computes_on_a_gpu(
    chosen: QuantizerFamily, bits: int, layout: tuple[Layout, int]
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, 3, 3, generator=draw).to(GPU))
    quantizer = chosen.weight(weight, bits, *layout).to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = quantizer(weight)
    assert rounded.dtype == torch.float32
    penalty = quantizer.rounding_penalty(4.0)
    loss = rounded.square().sum() if penalty is None else rounded.square().sum() + penalty
    loss.backward()
    grads = [p.grad for p in (weight, *quantizer.parameters()) if p.grad is not None]
    assert grads
    assert all(isinstance(grad, GpuTensor) for grad in grads)
    channels = 4 if layout[0] is Layout.ROWS else 12
    if chosen.rescales:
        quantizer.rescale_(torch.full((channels,), 1.1, device=GPU))
    quantizer.settle_()
    found = quantizer.quantized(weight)
    assert all(isinstance(t, GpuTensor) for t in (found.codes, found.scale, found.zero_point))
    assert {found.scale.dtype, found.zero_point.dtype} == {torch.float32}


@pytest.mark.parametrize(
    "chosen", [f for f in FAMILIES if f.float_weight], ids=lambda value: value.name
)
@pytest.mark.usefixtures("gpu")
def test_quantizers_of_floating_point_grids_compute_on_a_gpu(chosen: QuantizerFamily) -> None:
    assert chosen.float_weight is not None
    assert chosen.float_activation is not None
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(GPU)
    forms = formats_of(4, signed=True)
    quantizer = chosen.float_weight(weight, 4, Layout.ROWS, forms=forms).to(GPU)
    activation = chosen.float_activation(4, forms=formats_of(4)).to(GPU)
    activation.limits, activation.observing = (0.0, 2.0), True
    x = torch.randn(4, 6, 5, 5).relu().bfloat16().to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = quantizer(weight), activation(x)
    assert {tensor.dtype for tensor in rounded} == {torch.float32}
    (rounded[0].square().sum() + rounded[1].square().sum()).backward()
    trained = [*quantizer.parameters(), *activation.parameters()]
    assert all(isinstance(parameter.grad, GpuTensor) for parameter in trained)
    if chosen.rescales:
        quantizer.fit_(weight, torch.eye(54, dtype=torch.float64, device=GPU)[None], torch.ones(1, dtype=torch.float64, device=GPU))  # fmt: skip
    found = quantizer.quantized(weight)
    assert all(isinstance(tensor, GpuTensor) for tensor in (found.codes, found.scale))


@pytest.mark.parametrize("chosen", FAMILIES, ids=lambda value: value.name)
@pytest.mark.usefixtures("gpu")
def test_activation_quantizer_computes_on_a_gpu(chosen: QuantizerFamily) -> None:
    """Layers give bfloat16; the grid, its gradient and what it rounds stay in float32."""
    quantizer = chosen.activation(4).to(GPU)
    quantizer.limits, quantizer.observing = (0.0, 2.0), True
    x = torch.randn(4, 3, 5, 5).relu().bfloat16().to(GPU).requires_grad_()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            rounded = quantizer(x)
    quantizer.observing = False
    assert rounded.dtype == torch.float32
    rounded.square().sum().backward()
    tensors = [rounded, *quantizer.grid(), *quantizer.buffers()]
    tensors += [p.grad for p in quantizer.parameters() if p.grad is not None]
    assert all(isinstance(t, GpuTensor) and t.dtype == torch.float32 for t in tensors)
    assert isinstance(x.grad, GpuTensor)


TUNINGS = {type(recipe.tuning): recipe for recipe in reversed(RECIPES.values())}


def test_all_tunings_have_an_example() -> None:
    assert {*concrete(Tuning, gdfq.tuning)} == {*TUNINGS}


class _Parts:
    """Holds what a stage registers, and reads a state as from a file."""

    def __init__(self, states: dict[str, Any] | None = None) -> None:
        self.parts: dict[str, Any] = {}
        self.states = states or {}

    def register(self, name: str, part: Any) -> Any:
        self.parts[name] = part
        if name in self.states:
            part.load_state_dict(self.states[name])
        return part


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", [kind for kind in TUNINGS if kind is not NoTuning], ids=lambda kind: kind.__name__
)
@pytest.mark.usefixtures("gpu")
def test_tuning_trains_and_resumes_on_a_gpu(kind: type, precision: Any) -> None:
    recipe = small_recipe(TUNINGS[kind])
    teacher = on_gpu(networks.captured("Residual"))
    student = build_student(
        teacher, Scheme(Bits(4, 4), "full"), quantizers=recipe.quantizers,
        fixed_statistics=recipe.tuning.fixed_statistics,
    )  # fmt: skip
    images = networks.images(16).to(GPU)
    logits = teacher.logits(images)
    assert logits is not None
    batch = Batch((images,), logits.argmax(1), logits)
    calibrate_(student, [batch], steps=1)

    def tuned(states: dict[str, Any] | None = None, updates: int = 3) -> tuple[Any, list[Step]]:
        steps: list[Step] = []
        parts: Any = _Parts(states)
        context = Context(listener=steps.append, checkpointer=parts, precision=precision)
        feed = Feed(iter([batch] * 8), GPU)
        for _ in feed.until(1, hold=True):
            pass
        recipe.tuning.run_(student, teacher, feed, first_step=1, total_steps=1 + updates, batch=16, context=context)  # fmt: skip
        return parts, steps

    parts, steps = tuned()
    states = {name: part.state_dict() for name, part in parts.parts.items()}
    assert {*states} == {*recipe.tuning.parts}
    tensors = [*student.state_dict().values(), *(loss for s in steps for loss in s.losses.values())]
    assert all(isinstance(tensor, GpuTensor) for tensor in tensors)
    floats = [t for t in (*tensors, *tensors_in(states)) if t.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    tuned(reread(states), updates=5)


KINDS = {
    (type(r.source), type(getattr(r.source, "source", None)), type(r.tuning), r.quantizers.name): name
    for name, r in reversed(RECIPES.items())
}  # fmt: skip
"""A recipe for each combination of kinds."""


def run_of(name: str, **options: Any) -> Any:
    recipe = small_recipe(RECIPES[name], steps=1 if RECIPES[name].steps == 1 else 8)
    teacher = teacher_for(recipe.source)
    is_text = teacher.vocabulary is not None
    example = None if is_text else networks.images(1, shape=tuple(teacher.input_shape))
    if name in {"real", "paper-real"}:
        options["data"] = networks.images(16)
    copied = replace(teacher, network=deepcopy(teacher.network))
    return gdfq.quantize(copied, example, "w4a4", recipe, **options)


@pytest.mark.parametrize(
    "name",
    every_second(KINDS.values()) + [checked(n) for n in RECIPES if n not in KINDS.values()],
)
def test_recipe_gives_the_student_of_the_cpu_on_a_gpu(name: str) -> None:
    expected = run_of(name, device="cpu").network.state_dict()
    with simulated_gpu():
        actual = run_of(name, device="cuda").network.state_dict()
    assert actual.keys() == expected.keys()
    assert all(isinstance(tensor, GpuTensor) for tensor in actual.values())
    for key, tensor in expected.items():  # a code may be rounded otherwise
        error = (values_of(actual[key]).double() - tensor.double()).abs()
        assert float(error.max()) <= 1 if key.endswith(".codes") else 1e-2, key


@pytest.mark.parametrize("memory", [checked(None), "20KiB"])
@pytest.mark.usefixtures("gpu")
def test_run_with_all_that_follows_it_on_a_gpu(memory: str | None, tmp_path: Path) -> None:
    """Measuring, evidence, files and loading; a small budget passes images in parts."""
    labels = torch.arange(20) % networks.CLASSES
    test = torch.randint(0, 256, (20, *networks.SHAPE), dtype=torch.uint8), labels
    found = run_of(
        "quick", device="cuda", test=test, mean=[0.5] * 3, std=[0.3] * 3, memory=memory,
        precision="bfloat16",
    )  # fmt: skip
    evidence = gather(found.observations.teacher, found)
    assert not evidence.missing
    assert {*evidence.sections} == {"trust", "layers", "images", "test"}
    assert 0 <= found.evaluate(test) <= 100
    assert all(tensor.device.type == "cpu" for tensor in found.examples)
    for target in ("onnx", "pt2", "safetensors"):  # others need more installed
        found.export(tmp_path / f"student.{target}", target=target)
    found.save(tmp_path)
    images = networks.images(4)
    again = gdfq.load(tmp_path).to("cuda")
    assert values_of(again(images.cuda())).equal(values_of(found(images.cuda())))


@pytest.mark.usefixtures("gpu")
def test_bits_are_allocated_on_a_gpu() -> None:
    recipe = small_recipe(RECIPES["quick"])
    teacher = on_gpu(networks.captured("Residual"))
    found = gdfq.quantize(teacher, networks.images(1), "auto", recipe, size=9000, device="cuda")
    assert found.metrics["allocation"]["bytes"] <= 9000


class _StopError(Exception):
    pass


@pytest.mark.parametrize("stage", ["calibrate", "tune"])
@pytest.mark.parametrize("name", ["quick", checked("genie"), checked("paper")])
@pytest.mark.usefixtures("gpu")
def test_run_resumes_on_a_gpu(name: str, stage: str, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.stage == stage and step.index >= min(3, step.total):
            raise _StopError

    with pytest.raises(_StopError):
        run_of(name, device="cuda", checkpoints=tmp_path, listener=stop)
    resumed = run_of(name, device="cuda", checkpoints=tmp_path).network.state_dict()
    whole = run_of(name, device="cuda").network.state_dict()
    assert all(values_of(resumed[key]).equal(values_of(whole[key])) for key in whole)


@pytest.mark.usefixtures("gpu")
def test_images_and_costs_on_a_gpu() -> None:
    recipe = small_recipe(RECIPES["quick"])
    teacher = on_gpu(networks.captured("Residual"))
    images, labels = gdfq.generate(teacher, networks.images(1), 16, recipe, device="cuda")
    assert labels is not None
    assert images.device.type == labels.device.type == "cpu"
    scheme = Scheme(Bits(4, 8), "full")
    found = with_costs(diagnose(teacher, scheme, recipe), teacher, scheme, recipe)
    assert found.seconds is not None
    assert found.peak_bytes is not None


def check_network(teacher: Captured, inputs: tuple[Tensor, ...]) -> None:
    """Teacher, student and integer network of a network with all its operators on a GPU."""
    scheme = Scheme(Bits(4, 8), "full")
    with simulated_gpu(), torch.no_grad():
        teacher, inputs = on_gpu(teacher), tuple(tensor.to(GPU) for tensor in inputs)
        student = build_student(teacher, scheme, quantizers=LSQ)
        calibrate_(student, [Batch(inputs, None, None)], steps=1)
        frozen = freeze(student)
        found = [
            *in_order(teacher.network(*inputs)),
            *frozen.outputs(*inputs),
            *frozen.as_float().outputs(*inputs),
            *in_order(frozen.module(*inputs)),
        ]
    assert all(isinstance(output, GpuTensor) for output in found)


@pytest.mark.parametrize("name", every_second([*networks.NETWORKS, *networks.TASKS, "Transformer"]))
def test_network_computes_on_a_gpu(name: str) -> None:
    check_network(networks.captured(name), (networks.images(4, shape=networks.shape_of(name)),))


@pytest.mark.check
@pytest.mark.parametrize("name", unusual.NETWORKS)
@pytest.mark.filterwarnings("ignore")
def test_unusual_network_computes_on_a_gpu(name: str) -> None:
    teacher = capture(unusual.make(name), torch.zeros(1, *unusual.SHAPE))
    check_network(teacher, (torch.randn(4, *unusual.SHAPE),))


def test_network_of_several_inputs_computes_on_a_gpu() -> None:
    inputs = multi_input.token_inputs(4)
    check_network(capture(multi_input.tokens(), inputs), tuple(inputs.values()))
    images = multi_input.denoiser_inputs(4)
    check_network(capture(multi_input.denoiser(), images), tuple(images.values()))
