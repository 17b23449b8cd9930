"""A causal language model that reads a text token by token, and keeps keys and values.

A captured graph computes whole sequences: L tokens that are sampled one after another cost passes
of 1, 2, ..., L of them. Here a pass computes new tokens alone. That is right for a graph that looks
its tokens up in an embedding, and mixes them in products of matrices or in attention alone, each
position with those before it. Its tensors are of three kinds:

- *Fixed*: what depends on how many tokens there are, and on none of them, such as positions and
  masks. It is computed once, for the longest text, and cut to what is needed.
- *Rows*: one entry for each token, computed for the new ones.
- *Kept*: the second operands of products between tokens (keys and values), of all tokens so far.

Which axes of a tensor are tokens is found from its shapes for texts of two lengths.
"""

from collections.abc import Iterator
from itertools import accumulate, count, takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from gdfq.graph import operators, queries
from gdfq.graph.operators import name_of
from gdfq.graph.walk import Walk

_SEQUENCES, _LENGTHS = 3, (5, 7)
"""How many sequences the two texts have that show where tokens are, and of which lengths."""
_TOLERANCE = 1e-4
"""Greatest difference of logits, relative to the largest: other shapes round otherwise."""
_KEPT = dict.fromkeys(operators.PRODUCTS, (1,)) | {operators.ATTENTION: (1, 2)}
"""Positions of the operands that hold keys or values, by operator."""
_WITH_SIZES = operators.VIEWS | {operators.RESHAPE, operators.EXPAND}
_OF_SHAPES = {operators.BATCH_SIZE, operators.EMPTY_LIKE, *operators.FILLS}
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Reader(Protocol):
    """A language model that reads a text in pieces."""

    @property
    def bytes_kept(self) -> int:
        """Bytes that it keeps of each sequence of the longest text."""
        ...

    def begin(self) -> None:
        """Forget what was read."""
        ...

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [N, new], and return the logits of what follows, [N, vocabulary]."""
        ...


class WholePasses:
    """Reads with any function from token ids [N, L] to logits [N, L, vocabulary].

    Each piece passes with all tokens before it.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._seen: list[Tensor] = []

    @property
    def bytes_kept(self) -> int:
        """Bytes that it keeps of each sequence: none but its tokens."""
        return 0

    def begin(self) -> None:
        """Forget what was read."""
        self._seen.clear()

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [N, new], and return the logits of what follows, [N, vocabulary]."""
        self._seen.append(tokens)
        logits: Tensor = self._network(torch.cat(self._seen, 1))[:, -1]
        return logits


class TokenByToken(fx.Interpreter):
    """Reads with a captured graph, whose passes compute new tokens alone.

    Args:
        network: Token ids [N, L] -> logits [N, L, vocabulary]; no position depends on later ones.
        length: Tokens of the longest text.
        device: Where the network is.
    """

    def __init__(self, network: fx.GraphModule, length: int, device: torch.device | str) -> None:
        super().__init__(network)
        self._length, self._rows = length, _rows(network.graph)
        few = (
            _values(network, torch.zeros(_SEQUENCES, each, dtype=torch.long, device=device))
            for each in _LENGTHS
        )
        self._shapes = [{node: value.shape for node, value in values} for values in few]
        longest = torch.zeros(1, length, dtype=torch.long, device=device)
        self._fixed = {
            node: value if self._is_read(node) else None
            for node, value in _values(network, longest)
            if node not in self._rows
        }
        self._kept: dict[tuple[fx.Node, int], Tensor] = {}
        self._seen = self._new = 0

    @property
    def bytes_kept(self) -> int:
        """Bytes of the keys and values of a sequence of the longest text, in float32."""
        operands = (each for node in self._rows for each in self._keeps(node).values())
        numbers = sum(self._shapes[0][each].numel() for each in operands)
        return 4 * numbers * self._length // (_SEQUENCES * _LENGTHS[0])

    def begin(self) -> None:
        """Forget what was read."""
        self._kept.clear()
        self._seen = 0

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [N, new], and return the logits of what follows, [N, vocabulary]."""
        self._new = tokens.shape[1]
        logits: Tensor = self.run(tokens)[:, -1]
        self._seen += self._new
        return logits

    def run_node(self, node: fx.Node) -> Any:
        """Return the value of a node: what is fixed, or that of the new tokens."""
        if node in self._fixed:
            return self._fixed[node]
        if node.op != "call_function" or node not in self._rows:
            return super().run_node(node)
        operands = {each: self._cut(each, node) for each in node.all_input_nodes}
        found: Any = map_arg((node.args, node.kwargs), operands.__getitem__)
        args, kwargs = list(found[0]), found[1]
        for index, operand in self._keeps(node).items():
            (axis,) = self._axes(operand)
            before = [self._kept[node, index]] if self._seen else []
            self._kept[node, index] = args[index] = torch.cat([*before, args[index]], axis)
        if name_of(node) == operators.ATTENTION:
            named = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
            args, kwargs = [], self._masked(named)
        elif name_of(node) in _WITH_SIZES:
            args[1] = self._sizes(node, args[1])
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _is_read(self, fixed: fx.Node) -> bool:
        """Whether more than other fixed tensors depends on a fixed one."""
        return any(
            user in self._rows or user.op == "output" or name_of(user) == operators.BATCH_SIZE
            for user in fixed.users
        )

    def _axes(self, node: fx.Node) -> tuple[int, ...]:
        """The axes of a tensor that are as long as the text, from the last: -1, -2, ..."""
        if node not in self._shapes[0]:
            return ()
        shapes = zip(*(found[node] for found in self._shapes), strict=True)
        size = len(self._shapes[0][node])
        return tuple(axis - size for axis, sides in enumerate(shapes) if sides == _LENGTHS)

    def _keeps(self, node: fx.Node) -> dict[int, fx.Node]:
        """Those operands of a product between tokens, by position, that are kept."""
        positions = _KEPT.get(name_of(node), ())
        operands = {index: node.args[index] for index in positions}
        return {
            index: operand
            for index, operand in operands.items()
            if isinstance(operand, fx.Node)
            and operand in self._rows
            and len(self._axes(operand)) == 1
        }

    def _cut(self, operand: fx.Node, node: fx.Node) -> Any:
        """The value of an operand; what is fixed is cut to the tokens that `node` computes.

        Of two axes of tokens the first has the new ones, and the second all that were read.
        """
        value = self.env[operand]
        if operand not in self._fixed:
            return value
        of_mask = (-2, -1) if name_of(node) == operators.ATTENTION else ()
        rows, *columns = of_mask or self._axes(node) or (None,)
        for axis in self._axes(operand):
            if axis == rows:
                value = value.narrow(axis, self._seen, self._new)
            elif axis in columns:
                value = value.narrow(axis, 0, self._seen + self._new)
        return value

    def _sizes(self, node: fx.Node, sizes: Any) -> list[int]:
        """The sizes of a result, as many of them tokens as `_cut` says."""
        own: list[int] = list(sizes)
        for axis, size in zip(self._axes(node), (self._new, self._seen + self._new), strict=False):
            own[axis] = size
        return own

    def _masked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an attention whose queries are the new tokens alone."""
        if not arguments.get("is_causal", False):
            return arguments
        shape = (self._new, self._seen + self._new)
        mask = torch.ones(shape, dtype=torch.bool, device=arguments["query"].device)
        return arguments | {"is_causal": False, "attn_mask": mask.tril(self._seen)}


def reader_of(network: Any, length: int, device: torch.device | str) -> Reader:
    """Return what reads texts with a language model the fastest way.

    A captured graph computes new tokens alone if only an embedding reads its tokens, and if it then
    gives the logits of whole passes for a text of `length` random tokens.

    Args:
        network: Token ids [N, L] -> logits [N, L, vocabulary].
        length: Tokens of the longest text.
        device: Where the network is.

    Raises:
        OutOfMemoryError: Memory is short.
    """
    whole = WholePasses(network)
    if not isinstance(network, fx.GraphModule):
        return whole
    if not all(map(_are_looked_up, queries.inputs(network.graph))):
        return whole
    try:
        reader = TokenByToken(network, length, device)
        agree = _agree(reader, whole, length, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError):  # a graph of another form
        agree = False
    whole.begin()
    return reader if agree else whole


def _are_looked_up(tokens: fx.Node) -> bool:
    """Whether token ids are only looked up and counted: no text tries all comparisons with them."""
    return all(
        name_of(user) in _OF_SHAPES
        or name_of(user) == operators.EMBEDDING
        or (name_of(user) in _WITH_SIZES and _are_looked_up(user))
        for user in tokens.users
    )


def _agree(reader: Reader, whole: Reader, length: int, device: torch.device | str) -> bool:
    """Whether a reader gives the logits of whole passes, for two random texts of so many tokens."""
    first = torch.zeros(2, 1, dtype=torch.long, device=device)
    size = whole.read(first).shape[-1]
    whole.begin()
    text = torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0))
    for piece in text.to(device).tensor_split(_cuts(length), 1):
        expected, found = whole.read(piece), reader.read(piece)
        if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
            return False
    reader.begin()
    return True


def _cuts(length: int) -> list[int]:
    """Return where a text is cut into pieces of 1, 1, 2, 1, 4, 1, 8, ... tokens."""
    sizes = (size for power in count() for size in (2**power, 1))
    return list(takewhile(lambda end: end < length, accumulate(sizes)))


def _values(network: fx.GraphModule, tokens: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
    """Yield the tensors that operators compute from token ids [N, L]."""
    for visit in Walk(network).visits(tokens):
        if isinstance(visit.value, Tensor):
            yield visit.node, visit.value


def _rows(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on the tokens themselves, and not on their number alone."""
    found = set(queries.inputs(graph))
    for node in graph.nodes:
        if name_of(node) not in _OF_SHAPES and found.intersection(node.all_input_nodes):
            found.add(node)
    return found
