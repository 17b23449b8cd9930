"""Where the channels of a language model can be changed: its residual stream and its products.

    stream --norm--> readers (q, k, v, gate, up, head)
    stream <--sum--- writers (embedding, o, down)

A rotation or scale of the stream can be folded into all that reads and writes it, one of a writer's
input into what makes that input.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from gdfq.errors import UsageError
from gdfq.graph import operators, queries


@dataclass(frozen=True, eq=False)
class Norm:
    """A root-mean-square norm of the stream.

    Attributes:
        plain: The normalised tensor, before it is multiplied by the weight.
        node: The tensor that the readers read: multiplied by the weight, if there is one.
        weight: The constant of the weight [C]; None without one.
        readers: The linear layers that read it, and nothing else does.
    """

    plain: fx.Node
    node: fx.Node
    weight: fx.Node | None
    readers: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Heads:
    """The input of a writer that is a mixture of values, head by head.

    Attributes:
        values: The linear layer that makes the values.
        writer: The linear layer that reads the mixtures of all heads.
        size: Channels of a head.
    """

    values: fx.Node
    writer: fx.Node
    size: int


@dataclass(frozen=True, eq=False)
class Product:
    """The input of a writer that is a product with the output of a linear layer.

    Attributes:
        factor: The linear layer, which only this product reads.
        writer: The linear layer that reads the product alone.
    """

    factor: fx.Node
    writer: fx.Node


@dataclass(frozen=True, eq=False)
class Structure:
    """The residual stream of a language model.

    Attributes:
        width: Channels of the stream.
        embeddings: Nodes that look rows of a table up and begin the stream.
        writers: Linear layers whose outputs are added to it.
        norms: All that reads it.
    """

    width: int
    embeddings: tuple[fx.Node, ...]
    writers: tuple[fx.Node, ...]
    norms: tuple[Norm, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> "Structure":
        """Return the structure of a captured language model.

        Raises:
            UsageError: It has another form.
        """
        embeddings = tuple(n for n in graph.nodes if operators.name_of(n) == operators.EMBEDDING)
        stream: dict[fx.Node, None] = dict.fromkeys(embeddings)
        branches: list[fx.Node] = []
        for node in graph.nodes:
            if operators.name_of(node) == operators.ADD and any(
                source in stream for source in node.all_input_nodes
            ):
                branches += [source for source in node.all_input_nodes if source not in stream]
                stream[node] = None
        wrong = [node for node in branches if not _only_read_by(node, stream)]
        if not embeddings or wrong or any(not queries.has_weight(node) for node in branches):
            raise _other_form("an embedding and linear layers, each added once")
        norms = [_norm(plain) for node in stream for plain in _readers(node, stream)]
        width = int(embeddings[0].meta["val"].shape[-1])
        return cls(width, embeddings, tuple(branches), tuple(norms))


def _only_read_by(node: fx.Node, readers: dict[fx.Node, None]) -> bool:
    return len(node.users) == 1 and set(node.users) <= set(readers)


def _other_form(expected: str) -> UsageError:
    return UsageError(
        "an equalizer needs a language model whose residual stream is written by embeddings and "
        "linear layers and read by root-mean-square norms, as that of Llama, Mistral or Qwen; "
        f"this one is not {expected}. Use a recipe without an equalizer."
    )


def _readers(node: fx.Node, stream: dict[fx.Node, None]) -> Iterator[fx.Node]:
    """Yield the normalised tensors that are made of a tensor of the stream.

    Raises:
        UsageError: Something else reads it.
    """
    for user in node.users:
        name = operators.name_of(user)
        if user in stream or name == operators.BATCH_SIZE:
            continue
        is_product = name == operators.MULTIPLY
        if name == operators.RMS_NORM or (is_product and _divides_by_root_mean_square(user, node)):
            yield user
        elif name not in _SQUARES:
            raise _other_form(f"read by norms alone, but by {user.name}, too")


def _divides_by_root_mean_square(product: fx.Node, x: fx.Node) -> bool:
    """Return whether a product is x / √(mean(x²) + ε), the mean over the last dimension."""
    for root in product.all_input_nodes:
        sum_ = _argument(root, {operators.RECIPROCAL_ROOT})
        mean = _argument(sum_, operators.SUMS_WITH_NUMBERS) or sum_
        square = _argument(mean, {operators.MEAN})
        if mean is None or square is None:
            continue
        over_last = queries.mean_of(mean) in (([-1], True), ([x.meta["val"].ndim - 1], True))
        is_square = square.args[1:] in ((), (2,)) and _argument(square, _SQUARES) is x
        if over_last and is_square:
            return True
    return False


_SQUARES = frozenset({operators.SQUARE, operators.POWER})


def _argument(node: fx.Node | None, names: Collection[str]) -> fx.Node | None:
    """Return the first argument of a node that calls one of some operators, else None."""
    if node is None or operators.name_of(node) not in names:
        return None
    argument = node.args[0]
    return argument if isinstance(argument, fx.Node) else None


def _norm(plain: fx.Node) -> Norm:
    """Return the norm of a normalised tensor.

    Raises:
        UsageError: Something else than linear layers reads it.
    """
    node, weight = plain, None
    if operators.name_of(plain) == operators.RMS_NORM:
        given: Any = plain.args[2] if len(plain.args) > 2 else None
        weight = given
    elif len(plain.users) == 1:
        (user,) = plain.users
        others = [n for n in user.all_input_nodes if n is not plain]
        if operators.name_of(user) == operators.MULTIPLY and [n.op for n in others] == ["get_attr"]:
            node, (weight,) = user, others
    readers = tuple(user for user in node.users if operators.name_of(user) != operators.BATCH_SIZE)
    if not readers or not all(queries.has_weight(reader) for reader in readers):
        raise _other_form("normalised for linear layers alone")
    return Norm(plain, node, weight, readers)


def heads_of(writer: fx.Node) -> Heads | None:
    """Return the heads whose mixtures a writer reads, or None if its input is something else."""
    mixed = _unmoved(queries.input_of(writer))
    if mixed is None or operators.name_of(mixed) != operators.MATRIX_PRODUCT:
        return None
    scores, moved = mixed.all_input_nodes
    values = _unmoved(moved)
    is_mixture = operators.name_of(scores) in operators.SOFTMAX
    if not is_mixture or values is None or not queries.has_weight(values):
        return None
    size = _width(mixed)
    together = _reads_last(moved, values, size) and _joins_last(
        queries.input_of(writer), mixed, size
    )
    return Heads(values, writer, size) if together else None


def product_of(writer: fx.Node) -> Product | None:
    """Return the product that a writer reads, if one factor is a linear layer's output."""
    x = queries.input_of(writer)
    if operators.name_of(x) != operators.MULTIPLY or len(x.users) > 1:
        return None
    for factor in reversed(x.all_input_nodes):
        if queries.has_weight(factor) and len(factor.users) == 1:
            return Product(factor, writer)
    return None


def _unmoved(node: fx.Node) -> fx.Node | None:
    """Return what a tensor was before moves and repetitions; None if others read it on the way."""
    while operators.name_of(node) in operators.REPEATED_MOVES:
        if len(node.users) > 1:
            return None
        node = queries.input_of(node)
    return node if len(node.users) == 1 else None


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _joins_last(joined: fx.Node, source: fx.Node, size: int) -> bool:
    """Return whether the last `size` channels of a source lie together in what it is joined to."""
    node = joined
    while node is not source and _width(node) != size:
        if _moves_last(node):
            return False
        node = queries.input_of(node)
    return _reads_last(node, source, size)


def _reads_last(moved: fx.Node, source: fx.Node, size: int) -> bool:
    """Return whether a moved tensor keeps the last `size` channels of its source together."""
    node = moved
    while node is not source:
        if _moves_last(node) or _width(node) != size:
            return False
        node = queries.input_of(node)
    return True


def _moves_last(node: fx.Node) -> bool:
    """Return whether the last dimension of a move's input may lie elsewhere in its output."""
    name, last = operators.name_of(node), queries.input_of(node).meta["val"].ndim - 1
    given: Any = node.args[1:]
    if name == operators.PERMUTE:
        return bool(given[0][-1] % (last + 1) != last)
    if name == operators.SWAP:
        return any(dim % (last + 1) == last for dim in given)
    return name in operators.OTHER_MOVES
