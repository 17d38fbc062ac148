"""The start of a data stage, before it imports numpy: half of its CPU seconds went into what such a stage never uses.

if __name__ == "__main__":
    from kit.start import lean

    lean()
"""

from __future__ import annotations

import gc
import os


def lean() -> None:
    """Keep OpenBLAS, which numpy loads, from starting threads, and the imports from being searched for garbage.

    Of 0.5 CPU seconds 0.09 went into threads that waited for a matrix in a loop, 0.08 into looking again and again
    through modules and classes that stay. `stage.cli` switches the collector on. No training may call this: its
    matrices need the threads.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
