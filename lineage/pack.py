"""An evidence pack: all that verify reads, in one tar that is the same bytes for the same project.

    python -m lineage pack evidence.tar          prints the SHA-256 to keep elsewhere
    tar -xf evidence.tar -C somewhere            there: python lineage/verify.py [--key PUBLIC.pem]

In it are dvc.lock, params.yaml, every input and output that dvc.lock names, with raw text, models and code, the run
records, verify.py, and attestations/: an in-toto statement for each stage with SLSA provenance, which says by digest
what went in, what came out and which code made it. With a private ed25519 key (PEM) in TERROIR_SIGNING_KEY each
statement is signed in a DSSE envelope. Times stand in the run records alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

from lineage.questions import Lineage
from lineage.verify import PAYLOAD, Digests, payload_bytes, statement, told

KEY = "TERROIR_SIGNING_KEY"
OWN = Path(__file__).resolve().parent


def envelope(content: dict[str, Any], key: Any) -> dict[str, Any]:
    """Return a DSSE envelope of a statement, signed when there is a key."""
    body = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    signatures = []
    if key:
        public = key.public_key().public_bytes_raw()
        signed = base64.b64encode(key.sign(payload_bytes(PAYLOAD, body))).decode()
        signatures = [{"keyid": hashlib.sha256(public).hexdigest(), "sig": signed}]
    return {"payloadType": PAYLOAD, "payload": base64.b64encode(body).decode(), "signatures": signatures}


def signing_key() -> Any:
    """Return the private key that the environment names, None when it names none."""
    name = os.environ.get(KEY)
    if not name:
        return None
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise SystemExit(
            f"{KEY} is set, but signing needs the package cryptography: pip install cryptography"
        ) from None
    try:
        key = load_pem_private_key(Path(name).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{KEY}: {name} is no private key in PEM without a password ({error}).") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SystemExit(f"{KEY}: {name} is no ed25519 key; make one: openssl genpkey -algorithm ed25519 -out key.pem")
    return key


def pack(root: Path, target: Path) -> tuple[str, int, bool]:
    """Write the pack; return its SHA-256, its number of files, and whether it is signed.

    Raises SystemExit when something that dvc.lock names is not there, or the target cannot be written.
    """
    lock, key = Lineage(root).stages, signing_key()
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise SystemExit(f"{target} can be no file; name one in a folder that is there, e.g. evidence.tar.")
    paths = {path for stage in lock.values() for path in (*stage.deps, *stage.outs)}
    missing = sorted(path for path in paths if not (root / path).exists())
    if missing:
        raise SystemExit(f"{missing[0]} is not there; run `dvc repro` or `dvc checkout` before packing.")
    digests = Digests(root)
    digests.read(sorted(paths))
    files = {file: root / file for path in paths for file in digests.files(path)}
    files |= {
        "dvc.lock": root / "dvc.lock",
        "params.yaml": root / "params.yaml",
        "lineage/verify.py": OWN / "verify.py",
    }
    listings = {
        entry["md5"] for stage in lock.values() for entry in stage.outs.values() if entry["md5"].endswith(".dir")
    }
    for md5 in listings:  # they name the file in a folder that is not as it was
        listing = f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
        if (root / listing).is_file():
            files[listing] = root / listing
    made: dict[str, bytes] = {}
    for name, stage in lock.items():
        stated = envelope(statement(name, stage, digests, told(root, name)), key)
        text = json.dumps(stated, indent=1, sort_keys=True) + "\n"
        made[f"attestations/{name}.json"] = text.encode()
    temporary = target.with_name(f".tmp-{target.name}")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted({*files, *made}):
            head = tarfile.TarInfo(name)
            head.mode = 0o644
            if name in made:
                head.size = len(made[name])
                tar.addfile(head, io.BytesIO(made[name]))
                continue
            head.size = files[name].stat().st_size
            with files[name].open("rb") as content:
                tar.addfile(head, content)
    temporary.replace(target)
    with target.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest(), len(files) + len(made), key is not None
