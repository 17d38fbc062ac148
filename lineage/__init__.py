"""Questions about a finished project, answered from its artefacts: where a token came from, and what became of a line.

`python -m lineage --help` lists them. Nothing here is part of a result: no stage imports this package. What is known of
layouts and orders is taken from the modules in stages/ that made them; verify.py alone uses nothing of the project's.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "stages"))
