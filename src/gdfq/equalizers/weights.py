"""New weights for nodes of a captured network, where tensors may be shared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from gdfq.graph import operators
from gdfq.graph.capture import Captured
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import flat_module, tensors_of

TABLE, WEIGHT, BIAS = 0, 1, 2
"""Places of constants among the arguments of an embedding and of a linear layer."""


@dataclass(eq=False)
class Changes:
    """Constants of nodes that are to change, and nodes that are to be added.

    They are read in float64 and kept in the network's own precision, so that only those in work
    take twice their size.

    A constant that several nodes read, such as an embedding that is the head, too, becomes one for
    each of them.

    Attributes:
        teacher: The network.
        constants: New values by node and place among its arguments.
        skipped: Nodes that become one of their inputs.
        inserted: An operator that the first argument of a node passes, and its constants, which
            nodes may share.
    """

    teacher: Captured
    constants: dict[tuple[fx.Node, int], Tensor] = field(default_factory=dict)
    skipped: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inserted: dict[fx.Node, tuple[str, tuple[Tensor, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = tensors_of(self.teacher.network)
        self._dtype = next(t.dtype for t in self._tensors.values() if t.is_floating_point())

    def constant(self, node: fx.Node, place: int) -> Tensor:
        """Return the present value of a constant of a node, in float64."""
        return self._present(node, place).double()

    def _present(self, node: fx.Node, place: int) -> Tensor:
        argument = node.args[place]
        assert isinstance(argument, fx.Node)
        found = self.constants.get((node, place))
        return self._tensors[str(argument.target)].detach() if found is None else found

    def tensor(self, constant: fx.Node) -> Tensor:
        """Return the tensor of a node that is a constant, in float64."""
        return self._tensors[str(constant.target)].detach().double()

    def has(self, node: fx.Node, place: int) -> bool:
        """Return whether a node has a constant at a place."""
        return len(node.args) > place and isinstance(node.args[place], fx.Node)

    def set(self, node: fx.Node, place: int, value: Tensor) -> None:
        """Give a node a constant of its own."""
        self.constants[node, place] = value.to(self._dtype)

    def applied(self) -> Captured:
        """Return the network with all changes."""
        self._keep_others()
        tensors = dict(self._tensors)
        names = self._names(tensors)
        for key, value in self.constants.items():
            tensors[names[key]] = nn.Parameter(value, requires_grad=False)
        places: dict[fx.Node, list[int]] = {}
        for node, place in self.constants:
            places.setdefault(node, []).append(place)
        shared: dict[int, str] = {}
        passed: dict[tuple[fx.Node, int], fx.Node] = {}

        def constant(value: Tensor, operator: str, index: int) -> str:
            """Add a constant of an inserted operator, once."""
            if id(value) not in shared:
                name = f"{operator.replace('.', '_')}.part{index}_{len(shared)}"
                tensors[name] = value.to(self._dtype) if value.is_floating_point() else value
                shared[id(value)] = name
            return shared[id(value)]

        def passing(copy: Copy, node: fx.Node, x: fx.Node) -> fx.Node:
            """Write the inserted operator of a node, once for all that read the same of it."""
            operator, parts = self.inserted[node]
            key = x, id(parts[0])
            if key not in passed:
                found = [
                    copy.graph.get_attr(constant(part, operator, i)) for i, part in enumerate(parts)
                ]
                passed[key] = copy.graph.call_function(
                    operators.resolve(operator), (copy[x], *found)
                )
                passed[key].meta = {"val": x.meta["val"]}
            return passed[key]

        def change(copy: Copy, node: fx.Node) -> fx.Node | None:
            if node in self.skipped:
                return copy[self.skipped[node]]
            if node not in places and node not in self.inserted:
                return None
            arguments = list(copy.mapped(node.args))
            for place in places.get(node, ()):
                old = node.args[place]
                assert isinstance(old, fx.Node)
                arguments[place] = copy.graph.get_attr(names[node, place])
                arguments[place].meta = dict(old.meta)
            if node in self.inserted:
                x = node.args[0]
                assert isinstance(x, fx.Node)
                arguments[0] = passing(copy, node, x)
            new = copy.of(node)
            new.args = tuple(arguments)
            return new

        graph = rewrite(self.teacher.network.graph, change)
        graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
        return replace(self.teacher, network=flat_module(graph, tensors))

    def _keep_others(self) -> None:
        """Give what reads a changed constant and does not change a constant of its own, too."""
        for node, place in list(self.constants):
            shared = node.args[place]
            assert isinstance(shared, fx.Node)
            for user in shared.users:
                for i, argument in enumerate(user.args):
                    if argument is shared:
                        self.constants[user, i] = self._present(user, i)

    def _names(self, tensors: Mapping[str, Tensor]) -> dict[tuple[fx.Node, int], str]:
        """Return the name of each changed constant: its own for the last node that reads it.

        A linear layer is called by its weight, and stands behind the embedding that it shares it
        with.
        """
        found: dict[tuple[fx.Node, int], str] = {}
        last: dict[str, tuple[fx.Node, int]] = {}
        position = {node: i for i, node in enumerate(self.teacher.network.graph.nodes)}
        for key in sorted(self.constants, key=lambda key: position[key[0]]):
            last[self._target(key)] = key
        for key in self.constants:
            target = self._target(key)
            name = target if last[target] is key else f"{target}_of_{key[0].name}"
            while name != target and name in tensors:
                name += "_"
            found[key] = name
        return found

    @staticmethod
    def _target(key: tuple[fx.Node, int]) -> str:
        argument = key[0].args[key[1]]
        assert isinstance(argument, fx.Node)
        return str(argument.target)
