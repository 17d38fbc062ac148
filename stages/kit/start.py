"""The start of a data stage, before it imports numpy and pyarrow, which read these settings once.

if __name__ == "__main__":
    from kit.start import lean

    lean()
"""

from __future__ import annotations

import gc
import os


def lean() -> None:
    """Keep OpenBLAS from threads, Arrow from holding freed memory, and the imports from being searched for garbage.

    Of 0.5 CPU seconds 0.09 went into threads that waited for a matrix in a loop, 0.08 into looking again and again
    through modules and classes that stay. `stage.cli` switches the collector on. Arrow's own pool keeps what a worker's
    largest shards once needed: the more shards, the more. No training may call this: its matrices need the threads.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    gc.disable()
