"""A sweep: a grid of networks, bit widths, recipes and seeds as a value, read from a YAML file."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

from gdfq.analysis.bit_allocation import AUTO
from gdfq.data.preprocessing import normalisation
from gdfq.errors import UsageError, first_line, warn_renamed
from gdfq.plan.elsewhere import check_takes_candidates
from gdfq.plan.method import resolve_method
from gdfq.plan.options import DEFAULT_BITS
from gdfq.recipes import find_recipe
from gdfq.student.scheme import parse_placement

Value = TypeVar("Value")

_MAX_FILE_BYTES, _MAX_DEPTH, _MAX_RUNS = 2**20, 8, 10_000
"""Limits of a sweep: bytes of its file, levels of nested lists and mappings, and runs."""


@dataclass(frozen=True)
class Network:
    """A network of a sweep: the argument and the options of `gdfq quantize` that belong to it.

    `name` stands for it in the table; by default it is the end of `model`. Networks of a sweep
    that differ have different ones, because the table takes runs of one name for one network.
    """

    model: str
    name: str = ""
    weights: str | None = None
    input: str | None = None
    mean: str | None = None
    std: str | None = None
    classifier: bool | None = None
    device: str | None = None
    test: str | None = None
    data: str | None = None
    proxy: str | None = None
    size: str | None = None

    @property
    def title(self) -> str:
        return self.name or Path(self.model).name

    def options(self) -> list[str]:
        """Return all options but `size`, which only `--bits auto` takes, as arguments."""
        words = []
        for option in ("weights", "input", "mean", "std", "device", "test", "data", "proxy"):
            value = getattr(self, option)
            words += [] if value is None else [f"--{option}={value}"]
        if self.classifier is not None:
            words += ["--classifier" if self.classifier else "--no-classifier"]
        return words


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    network: Network
    bits: str
    recipe: str
    placement: str | None
    layer_bits: tuple[str, ...]
    seed: int
    steps: int | None
    budget: str | None = None

    def words(self) -> list[str]:
        """Return the arguments of `gdfq quantize` for this run, without --out."""
        words = [*self.network.options(), f"--bits={self.bits}", f"--recipe={self.recipe}"]
        words += [f"--size={self.network.size}"] if self.bits == AUTO else []
        words += [f"--placement={self.placement}"] if self.placement else []
        words += [f"--layer-bits={text}" for text in self.layer_bits]
        words += [f"--steps={self.steps}"] if self.steps is not None else []
        words += [f"--budget={self.budget}"] if self.budget is not None else []
        return [*words, f"--seed={self.seed}", "--", self.network.model]

    @property
    def folder(self) -> str:
        """A readable folder name, unique to the command: it ends in a hash of the arguments."""
        parts = [self.network.title, self.bits, self.recipe, self.placement, *self.layer_bits]
        text = "-".join([*filter(None, parts), f"seed{self.seed}"])
        digest = hashlib.sha256("\0".join(self.words()).encode()).hexdigest()
        return f"{re.sub(r'[^a-zA-Z0-9_=-]+', '_', text)[:100]}-{digest[:8]}"


@dataclass(frozen=True)
class Sweep:
    """All combinations of the listed values; each runs as one `gdfq quantize` command.

    A placement of None is the recipe's default, bits of None are those of the placement. Each
    element of `layer_bits` holds the overrides of one run.
    """

    networks: tuple[Network, ...]
    bits: tuple[str | None, ...] = (None,)
    recipes: tuple[str, ...] = ("fast",)
    placement: tuple[str | None, ...] = (None,)
    layer_bits: tuple[tuple[str, ...], ...] = ((),)
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    budget: str | None = None

    def __post_init__(self) -> None:
        lists = self.networks, self.bits, self.recipes, self.placement, self.layer_bits, self.seeds
        runs = math.prod(map(len, lists))
        if runs > _MAX_RUNS:
            raise UsageError(
                f"a sweep must have at most {_MAX_RUNS} runs; this one has {short(runs)}. Split it."
            )
        for network in self.networks:
            _check_normalisation(network)
        _check_titles(self.networks)
        for network, bits in product(self.networks, self.bits):
            if bits == AUTO and network.size is None:
                raise UsageError(
                    f"bits auto needs a size for each network; {network.title} has none. "
                    "Give it one, as size: 300KB."
                )
        settings = product(self.bits, self.recipes, self.placement, self.layer_bits)
        for bits, recipe, placement, layer_bits in settings:
            method = resolve_method(
                bits,
                recipe,
                size=1 if bits == AUTO else None,
                placement=placement,
                layer_bits=layer_bits,
                steps=self.steps,
                budget=self.budget,
            )
            if any(network.proxy is not None for network in self.networks):
                check_takes_candidates(method)

    def cells(self) -> list[Cell]:
        """Return the runs without duplicates; seeds vary fastest."""
        grid = product(
            self.networks, self.bits, self.recipes, self.placement, self.layer_bits, self.seeds
        )
        found = (
            Cell(
                network,
                bits or DEFAULT_BITS[parse_placement(placement or find_recipe(recipe).placement)],
                recipe,
                placement,
                layer_bits,
                seed,
                self.steps,
                self.budget,
            )
            for network, bits, recipe, placement, layer_bits, seed in grid
        )
        return list(dict.fromkeys(found))


def _check_titles(networks: Sequence[Network]) -> None:
    """Raise UsageError for different networks with one title; equal ones are duplicates."""
    seen: dict[str, Network] = {}
    for network in networks:
        other = seen.setdefault(network.title, network)
        if other != network:
            names = [field.name for field in fields(Network)]
            differs = [name for name in names if getattr(network, name) != getattr(other, name)]
            raise UsageError(
                "different networks of a sweep must have different names, by which the table "
                f"tells them apart; two that differ in {', '.join(differs)} are called "
                f"{short(network.title)}. Give each a name of its own, as name: small."
            )


def _check_normalisation(network: Network) -> None:
    """Raise UsageError for mean and std that no network can have."""
    try:
        mean, std = (
            None if text is None else tuple(map(float, text.split(",")))
            for text in (network.mean, network.std)
        )
    except ValueError as error:
        raise UsageError(
            f"mean and std of {network.title} must be numbers; {first_line(error)}. "
            "Give them as [0.485, 0.456, 0.406]."
        ) from error
    try:
        normalisation(mean, std)
    except UsageError as error:
        raise UsageError(f"{network.title}: {error}") from error


def read_sweep(path: Path) -> Sweep:
    """Read a sweep from a YAML file.

    Raises:
        UsageError: It is not a valid sweep; the message names the line where one is known.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UsageError(
                f"a sweep file must have at most {_MAX_FILE_BYTES} bytes; {path} has more."
            )
        text = path.read_text(encoding="utf-8")
        _check_syntax(text)
        return _sweep(_safe_load(text))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"a sweep is a YAML file; {path} cannot be read: {first_line(error)}"
        ) from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _check_syntax(text: str) -> None:
    """Raise UsageError for invalid YAML, unknown keys, aliases and deep nesting.

    A few nested aliases can expand to billions of values, and reading n open brackets takes O(n²).
    """
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                line = event.start_mark.line + 1
                raise UsageError(
                    f"line {line}: lists and mappings of a sweep must be nested at most "
                    f"{_MAX_DEPTH} deep; these are deeper. Flatten them."
                )
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise UsageError(
                    f"line {line}: a sweep must not contain aliases (*name). Write the values out."
                )
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{line}a sweep must be valid YAML; {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"a sweep must be valid YAML; {first_line(error)}.") from error
    _check_keys(root, "a sweep", Sweep, old=("keep",))
    for key, value in getattr(root, "value", ()):
        if key.value == "networks":
            for network in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(network, yaml.MappingNode):
                    _check_keys(network, "a network", Network)


def _check_keys(node: Any, what: str, kind: type, old: Sequence[str] = ()) -> None:
    known = [field.name for field in fields(kind)]
    if getattr(node, "tag", None) != "tag:yaml.org,2002:map":
        raise UsageError(
            f"{what} must be a mapping with the keys {', '.join(known)}; this is not a mapping."
        )
    seen: set[str] = set()
    for key, _ in node.value:
        line = f"line {key.start_mark.line + 1}: "
        if key.tag != "tag:yaml.org,2002:str" or key.value not in (*known, *old):
            raise UsageError(
                f"{line}{what} has no key {short(key.value)}. Its keys are {', '.join(known)}."
            )
        if key.value in seen:
            raise UsageError(f"{line}{key.value} is given twice. Make one list of both.")
        seen.add(key.value)


def _safe_load(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # for example the date 2024-99-99
        raise UsageError(f"a sweep must be valid YAML; {first_line(error)}.") from error


def _sweep(values: Mapping[str, Any]) -> Sweep:
    if "keep" in values:
        warn_renamed("keep", "layer_bits")
        values = {"layer_bits" if key == "keep" else key: value for key, value in values.items()}
    readers: dict[str, Callable[[Any, str], Any]] = {
        "networks": _network,
        "bits": _text,
        "recipes": _text,
        "placement": _text,
        "layer_bits": _patterns,
        "seeds": _number,
    }
    if "networks" not in values:
        raise UsageError("a sweep must list its networks. Give networks: [MODEL, ...].")
    found: dict[str, Any] = {
        key: tuple(_each(values[key], key, read)) for key, read in readers.items() if key in values
    }
    if "steps" in values:
        found["steps"] = _number(values["steps"], "steps")
    if "budget" in values:
        found["budget"] = _text(values["budget"], "budget")
    return Sweep(**found)


def _each(value: Any, key: str, read: Callable[[Any, str], Value]) -> Iterator[Value]:
    """Read the values of a list; a single value counts as a list of one."""
    if value == [] or value is None:
        raise UsageError(
            f"{key} must have at least one value; it has none. Add one, or remove {key}."
        )
    return (read(item, key) for item in (value if isinstance(value, list) else [value]))


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UsageError(f"{key} must be text or a number; got {short(value)}.")
    return str(value)


def _number(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{key} must be whole numbers, at least 0; got {short(value)}.")
    return value


def _patterns(value: Any, key: str) -> tuple[str, ...]:
    return tuple(_text(item, key) for item in (value if isinstance(value, list) else [value]))


def _network(value: Any, key: str) -> Network:
    """Read a mapping of options, or the model alone. Lists become command-line text."""
    if not isinstance(value, dict):
        return Network(_text(value, key))
    if "model" not in value:
        raise UsageError(f"each of the networks must have a model; {short(value)} has none.")
    options: dict[str, Any] = {}
    for option, given in value.items():
        between = "x" if option == "input" else ","
        if option == "classifier":
            if not isinstance(given, bool):
                raise UsageError(f"classifier must be true or false; got {short(given)}.")
            options[option] = given
        elif isinstance(given, list):
            options[option] = between.join(_text(item, option) for item in given)
        else:
            options[option] = _text(given, option)
    return Network(**options)
