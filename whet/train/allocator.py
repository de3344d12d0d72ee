"""Memory that a CPU keeps from step to step."""

import ctypes

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK = 32 * 2**20  # bytes; glibc takes no more
NEVER = 2**31 - 1


def keep_large_blocks() -> None:
    """Let glibc keep what a step frees for the next one, for the rest of the process.

    By default it returns large blocks to the system, which has to clear each page again when the
    next layer asks for it. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(M_TRIM_THRESHOLD, NEVER)
