"""The raw files of a source, and the shards in which they are read: cut by content, so that a change moves few of them.

raw_files(Path("data/raw/laws"), params, [])    -> ["a.md", "b/c.md"], 0
shards(root, files, digests, params)            -> Shard("5f1c...", [Piece("a.md", ...), Piece("b/c.md", ...)]), ...
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import raw_params
from raw_records import COMPRESSIONS

SHARD_BYTES = 4 * 2**20  # about; decides what stands in which file of `documents` and of all that is made of them
PACKED = 4  # bytes of text for one of a compressed file, about: 2.5 to 12 in jsonl with gzip
LineShard = tuple[int, int, int, str]  # as `line_shards` yields them


class Piece(NamedTuple):
    """A file, or whole lines of one."""

    file: str  # as the ledger calls it
    path: Path
    start: int  # first byte, and the byte after the last; None: the whole file
    end: int | None
    before: int = 0  # lines of the file before it


class Shard(NamedTuple):
    """What is read at once."""

    content: str  # digest of names and bytes
    pieces: list[Piece]
    large: bool = False  # one file of more than SHARD_BYTES that only its records can cut


def raw_files(root: Path, params: raw_params.Params, ignore: list[str]) -> tuple[list[str], int]:
    """Return the files to read, relative to `root`, sorted, and how many `ignore` leaves out beside hidden ones.

    Hidden are names with a full stop in front, and with ~$, which Office writes beside a file that is open.

    The file's own name when `root` is one.

    A folder of `save_to_disk` is one such file. Raises SystemExit for a file of another kind, and for what is neither
    file nor folder, e.g. a link to a folder.
    """
    folder, names, left_out = root.parent, [root.name], list[str]()
    if root.is_dir() and not _is_dataset(root, params):
        folder, names = root, sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
        names = [name for name in names if not any(part.startswith((".", "~$")) for part in name.split("/"))]
        wanted = [name for name in names if not _is_ignored(name, ignore)]
        left_out = sorted(name for name in set(names) - set(wanted) if (root / name).is_file())
        names = wanted
        datasets = {name for name in names if _is_dataset(folder / name, params)}
        for name in sorted(datasets):
            inside = [one for one in [*names, *left_out] if one.startswith(f"{name}/")]
            needed = set(filter(_is_needed, inside))
            part = sorted(needed.intersection(left_out))
            if len(part) == len(needed):  # all of it is ignored
                datasets.remove(name)
                names = sorted(set(names).difference(inside, [name]))
            elif part:
                raise SystemExit(
                    f"{folder / part[0]}: `ignore` names it, but the folder is read as a whole; name all of it or not "
                    "this."
                )
        names = [name for name in names if name in datasets or not datasets.intersection(_parents(name))]
        names = [name for name in names if name in datasets or not _is_folder(folder / name)]
        names = [name for name in names if params.format != "arrow" or Path(name).name != "dataset_dict.json"]
    suffixes = raw_params.SUFFIXES[params.format]
    for name in names:
        path = folder / name
        if not path.is_file() and not _is_dataset(path, params):
            raise SystemExit(
                f"{path} is a link to a folder, or to nothing; put the files there, or name it in `ignore`."
            )
        if path.is_file() and not name.lower().endswith(suffixes):
            raise SystemExit(
                f"{path}: format {params.format} reads {', '.join(suffixes)} files; "
                "move it elsewhere or name it in `ignore`, so that nothing is left out in silence."
            )
        if "__pycache__" in name.split("/"):
            raise SystemExit(f"{path}: DVC does not track what lies in __pycache__; rename the folder.")
        if name != name.encode(errors="replace").decode():
            raise SystemExit(f"{path}: the file's name is not UTF-8, so the ledger cannot name it; rename it.")
    if not names:
        raise SystemExit(f"{root} holds no file to read; put {', '.join(suffixes)} files there.")
    return names, len(left_out)


def _is_ignored(name: str, patterns: list[str]) -> bool:
    """Return whether a pattern means a path, a folder that holds it, or the name of one of them."""
    paths = [name, *_parents(name)[:-1]]
    return any(fnmatch(path, p) or fnmatch(path.rpartition("/")[2], p) for path in paths for p in patterns)


def paths(root: Path, file: str) -> list[Path]:
    """Return the files on the disk that are `file` to the ledger: one, or those of a folder of `save_to_disk`."""
    path = root / file if (root / file).exists() else root
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


def _is_dataset(path: Path, params: raw_params.Params) -> bool:
    return params.format == "arrow" and (path / "state.json").is_file() and not path.is_symlink()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _parents(name: str) -> list[str]:
    return [parent.as_posix() for parent in Path(name).parents]


def _is_needed(name: str) -> bool:
    """Return whether a file of a folder of `save_to_disk` says what its rows are; the others are caches and notes."""
    return name.endswith("/state.json") or (name.endswith(".arrow") and not fnmatch(name, "*/cache-*"))


def shards(
    root: Path,
    files: list[str],
    digests: dict[str, str],
    params: raw_params.Params,
    lines: Callable[[Path, str | None], Iterable[LineShard]],
) -> Iterator[Shard]:
    """Yield shards of about 4 MB, in order.

    `digests`: SHA-256 of each file below `root`. lines: as `line_shards`, of a file with this SHA-256. Small files are
    put together and large ones cut where their content says, so that a file or a line that comes or goes changes the
    shard that holds it and seldom a neighbour.
    """
    small: list[tuple[Piece, str, int]] = []
    for file in files:
        inside = paths(root, file)
        size = sum(path.stat().st_size for path in inside)
        path = root if file == root.name and not (root / file).exists() else root / file
        cuttable = raw_params.cuttable(path, params)
        size *= PACKED if path.suffix.lower() in COMPRESSIONS or params.format == "parquet" else 1
        # One that has come since has none: the stage will refuse to publish.
        known: list[Any] = [digests.get(_name(one, root)) for one in inside]
        if inside != [path]:  # state.json says which of them are read, by name
            known = [[_name(one, path), sha256] for one, sha256 in zip(inside, known, strict=True)]
        identity = hashlib.sha256(json.dumps([file, known], ensure_ascii=False).encode()).hexdigest()
        if size <= SHARD_BYTES:
            small.append((Piece(file, path, 0, None), identity, size))
            continue
        yield from _grouped(small)
        small = []
        if not cuttable:
            yield Shard(identity, [Piece(file, path, 0, None)], large=True)
            continue
        for start, end, before, digest in lines(path, known[0]):
            identity = hashlib.sha256(json.dumps([file, start == 0, digest]).encode()).hexdigest()
            yield Shard(identity, [Piece(file, path, start, end, before)])
    yield from _grouped(small)


def _name(path: Path, root: Path) -> str:
    return "" if path == root else path.relative_to(root).as_posix()


def _grouped(small: list[tuple[Piece, str, int]]) -> Iterator[Shard]:
    identities = np.array([int(identity[:8], 16) for _, identity, _ in small], dtype=np.uint32)
    begin = 0
    for end in cuts(identities, np.array([size for *_, size in small], dtype=np.int64), SHARD_BYTES):
        group = small[begin:end]
        digest = hashlib.sha256("".join(identity for _, identity, _ in group).encode()).hexdigest()
        yield Shard(digest, [piece for piece, *_ in group])
        begin = end


def line_shards(path: Path) -> Iterator[LineShard]:
    """Yield start, end, number of lines before and SHA-256 of the shards of a file; each ends with a line.

    Three quarters of a shard are taken as they come; then a line ends it with a probability of its length / (a quarter
    of SHARD_BYTES), decided by its CRC-32, and at twice SHARD_BYTES any line does. The first line read after the three
    quarters may be only the rest of one that began in them, so it decides nothing.
    """
    start, before, spread = 0, 0, SHARD_BYTES // 4
    with path.open("rb") as file:
        while head := file.read(SHARD_BYTES - spread):
            digest = hashlib.sha256(head)
            size, number = len(head), 0
            for number, line in enumerate(file, start=1):
                digest.update(line)
                size += len(line)
                if (number > 1 and zlib.crc32(line) / 2**32 < len(line) / spread) or size >= 2 * SHARD_BYTES:
                    break
            yield start, start + size, before, digest.hexdigest()
            start, before = start + size, before + head.count(b"\n") + number


def cuts(identities: np.ndarray, sizes: np.ndarray, shard_bytes: int) -> list[int]:
    """Return where each shard ends, as row numbers, the last being the number of rows.

    identities: uint32, a hash of each row's content. sizes: int64, its bytes. Three quarters of a shard are taken as
    they come; then a row ends it with probability size / (a quarter of shard_bytes), decided by its own hash: a row
    that comes or goes moves the cuts beside it and seldom others. A shard of two rows or more has at most twice
    `shard_bytes`.
    """
    spread = max(1, shard_bytes // 4)
    ends = np.flatnonzero(identities.astype(np.float64) / 2**32 < sizes / spread) + 1
    reach = np.cumsum(sizes, dtype=np.int64)
    found = [0]
    while found[-1] < len(sizes):
        begin = found[-1]
        before = int(reach[begin - 1]) if begin else 0
        enough = max(begin, int(np.searchsorted(reach, before + shard_bytes - spread)))
        chosen = ends[np.searchsorted(ends, enough, side="right") :][:1].tolist()
        too_much = int(np.searchsorted(reach, before + 2 * shard_bytes, side="right"))
        found.append(min(*chosen, max(too_much, begin + 1), len(sizes)))
    return found[1:]


def row_hashes(identities: Any) -> np.ndarray:
    """Return the first 4 bytes of each of an Arrow array of 16-byte identities, uint32."""
    flat = np.frombuffer(identities.buffers()[1], dtype=np.uint32)
    return flat.reshape(-1, 4)[identities.offset : identities.offset + len(identities), 0]
