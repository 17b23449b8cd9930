"""Memory of this process, by the standard library's `resource`: on Unix alone."""

import sys
from types import ModuleType


def _resource() -> ModuleType:
    try:
        import resource
    except ImportError:
        sys.exit("this measurement needs Linux or macOS: Python's module 'resource' is not here")
    return resource


def peak_resident_mib() -> float:
    """The most resident memory that the process ever held."""
    resource = _resource()
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage(2): bytes on macOS, else KiB
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / unit


def limit_address_space_(size: int) -> None:
    """Let each allocation fail that would take the process above so many bytes."""
    resource = _resource()
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
