"""How the C library of a training process hands out memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names of what it sets: glibc, malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, from now on, instead of giving it back to the system.

    glibc gives back what is free at the end of its heap, and every tensor of more than 32 MiB: BERT's word table has a
    gradient of 94 MB, made anew in every step. To take it again costs a fault for each of its pages, a tenth of a step
    on two cores. The peak of memory stays what it is. Returns False where there is no such switch: not on Linux, or
    with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
