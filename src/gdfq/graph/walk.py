"""Networks that run node by node, so that tensors can be measured and then freed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

Inputs = Sequence[Tensor]
"""A tensor [n, *shape] for each input of a network."""


@dataclass(frozen=True)
class Visit:
    """A node that has just run, with its inputs and its value."""

    node: fx.Node
    inputs: tuple[Any, ...]
    value: Any


class Walk(fx.Interpreter):
    """Runs a graph node by node and frees values after their last use."""

    def visits(self, *inputs: Tensor) -> Iterator[Visit]:
        """Yield each operator once, in order, for one tensor per input of the network."""
        self.env = {}
        self.args_iter = iter(inputs)
        for node in self.graph.nodes:
            arguments, _ = self.fetch_args_kwargs_from_env(node)
            with torch.no_grad():
                self.env[node] = self.run_node(node)
            if node.op == "call_function":
                yield Visit(node, arguments, self.env[node])
            for finished in self.user_to_last_uses.get(node, []):
                del self.env[finished]


class PartsInterpreter(fx.Interpreter):
    """Runs a graph on a batch in parts: all parts pass a node before the first passes the next.

    A value computed from the whole batch can therefore change later nodes. Only tensors that later
    nodes read stay in memory, with the work space of one part.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        # A module that several nodes call is found under each of its names.
        self.submodules = dict(network.named_modules(remove_duplicate=False))

    def run_parts(
        self, parts: Sequence[Inputs], later: Mapping[str, Sequence[Inputs]] = MappingProxyType({})
    ) -> None:
        """Run as `nodes_of_parts`; nothing is returned."""
        for _ in self.nodes_of_parts(parts, later):
            pass

    def nodes_of_parts(
        self, parts: Sequence[Inputs], later: Mapping[str, Sequence[Inputs]] = MappingProxyType({})
    ) -> Iterator[tuple[fx.Node, Sequence[dict[fx.Node, Any]]]]:
        """Run on the parts, and yield each node when all parts have passed it.

        Args:
            parts: For each part, a tensor [n, *shape] for each input of the network.
            later: Parts that join the others before a node, by its name. They pass the nodes before
                it one after the other: many large tensors are never held together.
        """
        arguments = list(map(iter, parts))
        envs: list[dict[fx.Node, Any]] = [{} for _ in parts]
        for node in self.graph.nodes:
            if node.op == "output":
                return
            for inputs in later.get(node.name, ()):
                envs.append(self._env_before(node, inputs))
                arguments.append(iter(()))
            self.before(node, envs)
            for env, iterator in zip(envs, arguments, strict=True):
                self._pass(node, env, iterator)
            self.after(node, envs)
            yield node, envs

    def _env_before(self, end: fx.Node, inputs: Inputs) -> dict[fx.Node, Any]:
        """Return the values that `end` and the nodes after it read, for inputs of one part."""
        env: dict[fx.Node, Any] = {}
        iterator = iter(inputs)
        for node in self.graph.nodes:
            if node is end:
                break
            self._pass(node, env, iterator)
        return env

    def _pass(self, node: fx.Node, env: dict[fx.Node, Any], inputs: Iterator[Tensor]) -> None:
        """Add a node's value to a part's values, and remove those that no later node reads."""
        self.env, self.args_iter = env, inputs
        env[node] = self.run_node(node)
        for finished in self.user_to_last_uses.get(node, []):
            del env[finished]

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        """Read the inputs of a node in each part, or change the node's module."""

    def after(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        """Read the value of a node in each part, or replace it."""
