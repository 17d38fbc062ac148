"""Which documents and tokens came in and went out between two commits.

A commit's artefacts are taken from DVC's cache by the digests in its dvc.lock, as a folder of links in .work/lineage.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from lineage.questions import Answer, Lineage, Source

KINDS = ("data/sources/", "data/clean/", "data/dedup/", "data/tokens/", "data/blocks/")
SPLITS = ("train", "eval")


def cache_folder(root: Path) -> Path:
    """Return where DVC's cache of this project lies."""
    config = configparser.ConfigParser()
    config.read([root / ".dvc/config", root / ".dvc/config.local"])
    given = config.get("cache", "dir", fallback=None)
    return (root / ".dvc" / given if given else root / ".dvc/cache") / "files/md5"


def at_revision(root: Path, revision: str) -> Path:
    """Return a folder with dvc.lock and params.yaml of a commit, and links to its cleaned, decided and tokenised data.

    Raises SystemExit when Git does not know the commit or DVC's cache no longer holds its data.
    """
    if not revision.strip():
        raise SystemExit("no commit is named; give one that Git knows, e.g. HEAD~1.")
    files = {}
    for name in ("dvc.lock", "params.yaml"):
        command = ["git", "-C", str(root), "show", f"{revision}:./{name}"]
        shown = subprocess.run(command, capture_output=True, check=False)
        if shown.returncode:
            raise SystemExit(f"{revision}: Git has no {name} there ({shown.stderr.decode().strip().splitlines()[-1]}).")
        files[name] = shown.stdout
    folder = root / ".work/lineage/revisions" / hashlib.sha256(b"".join(files.values())).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    cache = cache_folder(root)
    for stage in Lineage(folder).stages.values():
        for path, entry in stage.outs.items():
            if not path.startswith(KINDS):
                continue
            listing = cache / entry["md5"][:2] / entry["md5"][2:]
            if not listing.is_file():
                raise SystemExit(
                    f"{revision}: {path} of then is not in DVC's cache: what another machine ran comes with "
                    "`dvc fetch --all-commits` from a remote, or with `dvc repro` at that commit."
                )
            for one in json.loads(listing.read_bytes()):
                link = folder / path / one["relpath"]
                link.parent.mkdir(parents=True, exist_ok=True)
                target = (cache / one["md5"][:2] / one["md5"][2:]).resolve()
                if not target.is_file():
                    raise SystemExit(f"{revision}: {path}/{one['relpath']} of then is not in DVC's cache.")
                if not link.is_symlink():
                    link.symlink_to(target)
    return folder


class Kept:
    """The kept documents of a source: identity (its first 8 bytes), row, split and tokens of each."""

    def __init__(self, source: Source | None) -> None:
        self.source = source
        ids, rows, splits, tokens = (
            [np.zeros(0, np.uint64)],
            [np.zeros(0, np.int64)],
            [np.zeros(0, bool)],
            [np.zeros(0, np.int64)],
        )
        for number, batch in enumerate(source.decisions.all() if source else ()):
            flat = np.frombuffer(batch["doc_id"].buffers()[1], ">u8").reshape(-1, 2)[batch["doc_id"].offset :, 0]
            chosen = np.flatnonzero(pc.not_equal(batch["split"], "dropped").to_numpy(zero_copy_only=False))
            assert source
            ids.append(flat[chosen].astype(np.uint64))
            rows.append(chosen + int(source.decisions.starts[number]))
            splits.append(pc.equal(batch["split"], "train").to_numpy(zero_copy_only=False)[chosen])
        for batch in source.tokens.all() if source else ():
            tokens.append(np.diff(batch["input_ids"].offsets.to_numpy()).astype(np.int64))
        self.ids, self.rows, self.train, self.tokens = (np.concatenate(p) for p in (ids, rows, splits, tokens))


def compare(root: Path, rev1: str, rev2: str | None, limit: int = 20) -> Answer:
    """Return documents and tokens in and out, by source, and the first `limit` documents of each side."""
    before = Lineage(at_revision(root, rev1))
    after = Lineage(at_revision(root, rev2) if rev2 else root)
    answer: Answer = {"before": rev1, "after": rev2 or "the workspace", "sources": [], "in": [], "out": []}
    names = sorted({(source.phase, source.name) for source in (*before.sources, *after.sources)})
    for phase, name in names:
        sides = [_source(lineage, phase, name) for lineage in (before, after)]
        old, new = (Kept(side) for side in sides)
        gone, come = ~np.isin(old.ids, new.ids), ~np.isin(new.ids, old.ids)
        _, a, b = np.intersect1d(old.ids, new.ids, return_indices=True)
        answer["sources"].append(
            {
                "phase": phase, "source": name, "documents": len(new.ids), "tokens": int(new.tokens.sum()),
                "documents_in": int(come.sum()), "tokens_in": int(new.tokens[come].sum()),
                "documents_out": int(gone.sum()), "tokens_out": int(old.tokens[gone].sum()),
                "other_split": int((old.train[a] != new.train[b]).sum()),
                "tokens_of_the_others": int(new.tokens[b].sum() - old.tokens[a].sum()),
            }
        )  # fmt: skip
        for key, side, chosen, other in (("in", new, come, sides[0]), ("out", old, gone, sides[1])):
            answer[key] += [_document(side, int(n), other) for n in np.flatnonzero(chosen)[: limit - len(answer[key])]]
    return answer


def _source(lineage: Lineage, phase: str, name: str) -> Source | None:
    return next((one for one in lineage.sources if (one.phase, one.name) == (phase, name)), None)


def _document(side: Kept, at: int, other: Source | None) -> dict[str, Any]:
    """Return a kept document, and what is said of it where it is not kept."""
    assert side.source
    document = side.source.documents.row(int(side.rows[at]))
    rows = other.doc_ids(document["doc_id"]) if other else []
    why = "not among the documents" if other else "no such source"
    if other and rows:
        why = str(other.decisions.row(rows[0])["rule"])
    return {
        "source": side.source.name, "file": side.source.path(document["file"]), "number": document["number"],
        "doc_id": document["doc_id"].hex(), "tokens": int(side.tokens[at]), "on_the_other_side": why,
    }  # fmt: skip
