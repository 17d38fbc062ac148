"""Questions about a finished project, answered from its artefacts: where a token came from, and what became of a line.

`python -m lineage --help` lists them. Nothing here is part of a result: no stage imports this package.
"""
