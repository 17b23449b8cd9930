"""The equalizers by name."""

from collections.abc import Mapping

from gdfq.equalizers.base import Equalizer
from gdfq.equalizers.hadamard import Hadamard
from gdfq.equalizers.reassembly import Reassembly
from gdfq.equalizers.smooth import Smooth
from gdfq.errors import UsageError

EQUALIZERS: Mapping[str, Equalizer | None] = {
    "none": None,
    "hadamard": Hadamard(),
    "reassembly": Reassembly(),
    "smooth": Smooth(),
}


def find_equalizer(name: str) -> Equalizer | None:
    """Return an equalizer by its name.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in EQUALIZERS:
        raise UsageError(f"there is no equalizer {name!r}. Choose one of: {', '.join(EQUALIZERS)}.")
    return EQUALIZERS[name]
