"""Refusal of operators that no quantized network can have, before anything is computed."""

from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.graph import operators


def check_operators(module: fx.GraphModule) -> None:
    """Check that a canonical graph can be quantized, stored and exported.

    Raises:
        UsageError: It uses an operator outside `operators.ALLOWED`, or a recurrent layer in a form
            that no ONNX file can have.
    """
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    unknown = [node for node in calls if operators.name_of(node) not in operators.ALLOWED]
    if unknown:
        found = dict.fromkeys(f"{operators.name_of(node)}{_place(node)}" for node in unknown)
        raise UsageError(
            "a network may use the operators of gdfq.graph.operators.ALLOWED; "
            f"this one also uses {', '.join(sorted(found))}. Replace them by equivalent ones, "
            "or report the network so that they can be added."
        )
    for node in calls:
        if operators.name_of(node) in operators.RECURRENT and _projects(node):
            raise UsageError(
                "a recurrent layer must not project its state, because PyTorch writes it to ONNX "
                f"wrongly; the one{_place(node)} does. Remove proj_size."
            )


def check_constants(module: fx.GraphModule) -> None:
    """Check that an exported graph holds tensors alone.

    Raises:
        UsageError: It holds something else, such as a generator of random numbers.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        holder, _, name = str(node.target).rpartition(".")
        value = getattr(module.get_submodule(holder), name)
        if not isinstance(value, Tensor):
            raise UsageError(
                "a network may hold tensors alone in evaluation mode, and no random numbers; this "
                f"one uses a {type(value).__name__}. Draw random numbers in training mode alone."
            )


def _place(node: fx.Node) -> str:
    """Return ` in module 'head.act'`, or nothing where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]).rpartition("L__self___")[2] if stack else ""
    return f" in module {path!r}" if path else ""


def _projects(node: fx.Node) -> bool:
    """Return whether a recurrent layer has a weight that projects its state (`proj_size`)."""
    _, _, weights, has_biases, layers, _, _, bidirectional, *_ = node.args
    assert isinstance(weights, list | tuple)
    directions = 2 if bidirectional else 1
    assert isinstance(layers, int)
    return len(weights) > (4 if has_biases else 2) * layers * directions
