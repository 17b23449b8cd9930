"""What to expect of a run at its bits, from measured runs, with advice."""

from collections.abc import Iterator

from gdfq.analysis.measured import measured_drops
from gdfq.functional.grid import MAX_BITS, Bits


def preflight_advice(
    bits: Bits,
    *,
    normalises_batches: bool = False,
    untrained: bool = False,
) -> Iterator[str]:
    """Yield what to expect of a network at these bits.

    Args:
        bits: Bits of weights and activations.
        normalises_batches: Whether it has batch norms without running statistics.
        untrained: Whether its batch norms hold what they hold before training.
    """
    if untrained:
        yield (
            "all batch norms hold mean 0 and variance 1, as before training: is the network "
            "trained, and were its weights given (--weights, or load_state_dict)?"
        )
    if normalises_batches:
        yield (
            "batch norms without running statistics stay float, and the outputs of an image depend "
            "on the other images of its batch."
        )
    if bits.float_weights or bits.float_activations:
        yield (
            "runtimes compute layers with floating-point grids in float: the file is as small as "
            "with integer grids, and not faster than the network as it is."
        )
    smallest = min(bits.weights, bits.activations)
    if smallest == MAX_BITS:
        return
    if drops := ", ".join(map(str, measured_drops(bits))):
        yield f"with recipe fast, {bits} lost {drops}."
    if bits.activations < MAX_BITS and not bits.float_activations:
        yield "activations of 8 bits, such as w4a8, lose less and do not make the file larger."
