"""The quantized network: what a run gives, runs as a module, and is saved, loaded and exported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.analysis.accuracy import top1
from gdfq.analysis.language import LanguageMeasures, language_measures, perplexity
from gdfq.analysis.observations import Observations
from gdfq.data.tensors import TensorData, network_inputs, to_npz
from gdfq.deploy import safetensors as packed
from gdfq.deploy.card import Card
from gdfq.deploy.export import Exported, export
from gdfq.deploy.safetensors import EXAMPLES_FILE, STUDENT_FILE
from gdfq.deploy.target import Target
from gdfq.diffusion.pipeline import with_denoiser
from gdfq.errors import UsageError, warn_renamed
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.guards import smaller_budget_suggested
from gdfq.execution.malloc import release_freed_memory
from gdfq.execution.modes import without_modes_of_caller
from gdfq.execution.progress import Listener, silent
from gdfq.execution.seeding import stream
from gdfq.files.atomic import make_folder, write_atomically
from gdfq.files.untrusted import within
from gdfq.graph.capture import Captured
from gdfq.graph.ends import NO_ENDS, Ends, joined, output_names, split
from gdfq.graph.inputs import takes_images
from gdfq.graph.outputs import built
from gdfq.sources.given import load_given
from gdfq.student.integer_network import IntegerNetwork


class QuantizedNetwork(nn.Module):
    """A frozen low-bit network: normalised images [N, *shape] -> logits [N, classes].

    Weights are integer codes; activations are rounded to their grids while it runs. A network with
    several inputs takes them in order or by name (`card.inputs`). It returns what the original
    network does: probabilities if that ends in a softmax, for instance.

    Attributes:
        network: The integer network up to its logits, or to its outputs if no softmax or sigmoid
            follows.
        ends: What follows `network`.
        card: What the network takes and returns, and how it was made.
        metrics: Seconds and steps of the run that made it, and the top-1 accuracies of teacher and
            student if test images were given.
        examples: A few of the inputs that it was tuned on, [n, *shape] each. Exported files are
            compared on them.
        observations: What the report of its run also needs; it is not saved.
    """

    def __init__(
        self,
        network: IntegerNetwork,
        card: Card,
        metrics: Mapping[str, Any] | None = None,
        examples: Tensor | Sequence[Tensor] | None = None,
        observations: Observations | None = None,
        ends: Ends = NO_ENDS,
    ) -> None:
        super().__init__()
        self.network = network
        self.ends = ends
        self.card = card
        self.metrics = dict(metrics or {})
        if examples is None:
            draw = stream(0, "export.examples")
            examples = [spec.noise(16, draw) for spec in card.inputs]
        given = [examples] if isinstance(examples, Tensor) else examples
        self.examples: tuple[Tensor, ...] = tuple(tensor.cpu() for tensor in given)
        self.observations = observations

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Compute the outputs, of a tensor for each input in order or by its name."""
        names = [spec.name for spec in self.card.inputs][len(inputs) :]
        if sorted(names) != sorted(named):
            raise UsageError(
                f"the network takes {', '.join(map(str, self.card.inputs))}; got {len(inputs)} "
                f"tensors and {', '.join(named) or 'no names'}. Give one tensor for each input."
            )
        found = self.network.outputs(*inputs, *(named[name] for name in names))
        return built(self.card.outputs, self.ends.apply(found))

    @property
    def whole(self) -> IntegerNetwork:
        """The integer network with its end, as files hold it."""
        return IntegerNetwork(joined(self.network.module, self.ends))

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @without_modes_of_caller()
    def evaluate(
        self, data: Any, *, listener: Listener = silent, memory: str | int | None = None
    ) -> float:
        """Measure the top-1 accuracy on labelled images, or the perplexity of a language model.

        Args:
            data: Labelled images or text, as `test` of `gdfq.quantize`.
            listener: Called with every batch.
            memory: As in `gdfq.quantize`.

        Returns:
            The accuracy in percent, or the perplexity a token.

        Raises:
            UsageError: The data have no labels, or the network has no classes.
        """
        if self.card.vocabulary is not None:
            return perplexity(
                self.network, self._tokens(data), device=self.device, listener=listener
            )
        if self.card.classes is None:
            raise UsageError(
                "accuracy is for classifiers; the outputs of this network are not classes. "
                "Give test images to gdfq.quantize, which measures the error of the outputs; a "
                "denoiser is compared by gdfq.compare_samples."
            )
        card, preprocessing = self.card, self.card.preprocessing
        images = load_given(data, card.inputs, card.classes, preprocessing, card.class_names)
        budget = MemoryBudget.of(memory)
        with smaller_budget_suggested("evaluating", budget.room(self.device)):
            return top1(
                self.network,
                images,
                preprocessing,
                device=self.device,
                listener=listener,
                memory=budget,
            )

    @without_modes_of_caller()
    def compare_text(
        self, original: Captured, data: Any, *, listener: Listener = silent
    ) -> LanguageMeasures:
        """Compare a language model with its original on text.

        Args:
            original: The model that it was made from, on the same device.
            data: Token ids, as `test` of `gdfq.quantize`.
            listener: Called with every batch.

        Raises:
            UsageError: The text does not fit the model, or the original has another vocabulary.
        """
        if original.vocabulary != self.card.vocabulary:
            raise UsageError(
                "a language model is compared with the model that it was made from; the "
                f"vocabularies are {self.card.vocabulary} and {original.vocabulary}."
            )
        return language_measures(
            self.network,
            original.network,
            self._tokens(data),
            device=self.device,
            listener=listener,
        )

    def _tokens(self, data: Any) -> Tensor:
        """Return text as token ids [N, L]."""
        if isinstance(data, TensorData):
            return data.tensors[0]
        found = load_given(data, self.card.inputs, None)
        (tokens,) = network_inputs(found, torch.arange(len(found)), self.card.preprocessing)
        return tokens

    @classmethod
    def read(cls, path: Path) -> "QuantizedNetwork":
        """Read a .safetensors file that was saved or exported.

        Raises:
            UsageError: The file cannot be read, is damaged, or is of another version.
        """
        return cls._of_whole(*packed.read(path))

    @classmethod
    def read_folder(
        cls, folder: Path, metrics: Mapping[str, Any] | None = None
    ) -> "QuantizedNetwork":
        """Read what `save` wrote into a folder.

        Raises:
            UsageError: A file cannot be read, is damaged, or is of another version.
        """
        network, card = packed.read(within(folder, folder / STUDENT_FILE))
        examples = None
        if (folder / EXAMPLES_FILE).exists():
            path = within(folder, folder / EXAMPLES_FILE)
            found = load_given(path, card.inputs, card.classes)
            examples = network_inputs(found, torch.arange(len(found)), card.preprocessing)
        return cls._of_whole(network, card, metrics, examples)

    @classmethod
    def _of_whole(
        cls,
        network: IntegerNetwork,
        card: Card,
        metrics: Mapping[str, Any] | None = None,
        examples: Sequence[Tensor] | None = None,
    ) -> "QuantizedNetwork":
        """Divide a network that was read from a file in its body and its end."""
        body, ends = split(network.module)
        return cls(IntegerNetwork(body), card, metrics, examples, ends=ends)

    @without_modes_of_caller()
    def save(self, folder: str | Path) -> None:
        """Write `student.safetensors` and `examples.npz` into the folder, which `load` reads."""
        folder = Path(folder)
        make_folder(folder)
        (folder / STUDENT_FILE).unlink(missing_ok=True)
        write_atomically(folder / EXAMPLES_FILE, self._examples_npz())
        write_atomically(folder / STUDENT_FILE, packed.to_safetensors(self.whole, self.card))

    def _examples_npz(self) -> bytes:
        """The examples as `load_given` reads them: images as pixels, other inputs as they are."""
        if takes_images(self.card.inputs):
            return self.card.preprocessing.to_npz(self.examples[0])
        names = [spec.name for spec in self.card.inputs]
        return to_npz(dict(zip(names, self.examples, strict=True)))

    def pipeline(self, original: Any) -> Any:
        """Return a pipeline of diffusers with this denoiser in the place of its own.

        Args:
            original: The pipeline that the denoiser was taken from, which is changed; or its id or
                folder.

        Raises:
            UsageError: It cannot be loaded, or has no denoiser.
        """
        return with_denoiser(original, self, len(self.card.inputs))

    @without_modes_of_caller()
    def export(
        self,
        path: str | Path,
        *,
        target: str | Target | None = None,
        format: str | None = None,
        raw_input: bool = False,
        safe_x86: bool = False,
        memory: str | int | None = None,
        original: str | None = None,
    ) -> Exported:
        """Write one file that deploys, and keep it only if its runtime gives the same outputs.

        The folder of the path is created if it does not exist.

        Args:
            path: The file. The target is that of its suffix, unless it is given.
            target: A name in `gdfq.TARGETS`, or a `Target` of your own.
            format: The old spelling of `target`.
            raw_input: Write a file that takes uint8 pixels and normalises them itself (ONNX,
                LiteRT and OpenVINO).
            safe_x86: Use 7-bit weights in layers whose 8-bit sums could saturate on x86 processors
                without VNNI (ONNX and OpenVINO).
            memory: As in `gdfq.quantize`. The file is compared on as many of `examples` as fit.
            original: The model that this network was made from, as `hf:ID`: target
                `compressed-tensors` writes a folder of weights for its code.

        Returns:
            What was written, and how its outputs compare with those of this network.

        Raises:
            UsageError: The target cannot express the network, its runtime is not installed, or an
                option does not fit it.
            GdfqError: The outputs differ. Nothing is written, and an existing file stays.
        """
        if format is not None:
            warn_renamed("format", "target")
            target = format
        accuracy: dict[str, float] = {
            who: self.metrics[who]["top1"]
            for who in ("teacher", "student")
            if "top1" in self.metrics.get(who, {})
        }
        release_freed_memory()
        return export(
            self.whole,
            self.card,
            Path(path),
            self.examples,
            names=output_names(self.card, self.ends),
            target=target,
            raw_input=raw_input,
            safe_x86=safe_x86,
            accuracy=accuracy,
            memory=MemoryBudget.of(memory),
            original=original,
        )
