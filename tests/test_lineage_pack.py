"""`lineage pack`: a stranger checks it without the project; another key, an altered byte or statement is found."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from lineage import verify
from lineage.erase import exclude
from lineage.pack import KEY, pack

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes([77] * 32))


def pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, path: Path) -> Path:
    """Write a key and its public half as path and path.pub."""
    form, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(form, kind, serialization.NoEncryption()))
    public = key.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def packed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed pack of the finished tiny project, taken apart."""
    home = tmp_path_factory.mktemp("pack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, str(pem(PRIVATE, home / "key.pem")))
        digest, files, signed = pack(finished, home / "one.tar")
        assert signed
        assert files > 200
        assert pack(finished, home / "other.tar")[0] == digest  # the same bytes each time
    with tarfile.open(home / "one.tar") as tar:
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in tar)
        tar.extractall(home / "pack", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # 3.11.4
    pem(OTHER, home / "other.pem")
    return home / "pack"


def run(pack: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the pack's own verify.py, isolated from this project, with every socket refused."""
    code = (
        "import runpy, socket, sys\n"
        "def refused(*a, **k): raise OSError('no network here')\n"
        "socket.socket = refused\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-I", "-c", code, "lineage/verify.py", *arguments]
    return subprocess.run(command, cwd=pack, capture_output=True, text=True, check=False)


def test_the_key_of_the_exclusions_is_in_no_pack(finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    exclude(root, {b"\xab" * 16})
    (root / "params.yaml").chmod(0o755)
    pack(root, tmp_path / "one.tar")
    with tarfile.open(tmp_path / "one.tar") as tar:
        names = tar.getnames()
        assert names == sorted(names) and {member.mode for member in tar} == {0o644}
        tar.extractall(tmp_path / "pack", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert "data/exclusions.txt" in names and "data/exclusions.key" not in names
    key = (root / "data/exclusions.key").read_bytes().strip()
    assert not any(key in path.read_bytes() for path in (tmp_path / "pack").rglob("*") if path.is_file())
    (root / "data/raw/tiny_notes.txt").unlink()
    with pytest.raises(SystemExit, match=r"data/raw/tiny_notes\.txt is not there; run `dvc repro`"):
        pack(root, tmp_path / "one.tar")


def test_a_stranger_accepts_it_without_project_and_network_and_only_with_the_right_key(packed: Path) -> None:
    done = run(packed, "--key", str(packed.parent / "key.pub"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ok +attestations +\d+ agree with the bytes", done.stdout)
    assert not (packed / ".git").exists()
    assert run(packed).returncode == 0
    assert "signatures are not checked" in run(packed).stdout
    done = run(packed, "--key", str(packed.parent / "other.pub"))
    assert done.returncode == 1
    assert "it is not signed with this key" in done.stdout
    assert "is no ed25519 public key" in run(packed, "--key", "dvc.lock").stderr


def test_an_altered_file_and_an_altered_statement_are_found(packed: Path) -> None:
    key = verify.public_key(packed.parent / "key.pub")
    path = packed / "data/blocks/chat/train/data-00000.arrow"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    findings = [f for f in verify.verify(packed, key=key).findings if f.status == "FAILED"]
    failed = {f.path for f in findings if f.check == "attestations"}
    assert "it is another file than DVC has listed for data/blocks/chat" in [f.detail for f in findings]
    content[-200] ^= 1
    path.write_bytes(content)
    assert failed == {"data/blocks/chat/train/data-00000.arrow"}

    path = packed / "attestations/clean@tiny_qa.json"
    text = path.read_text()
    whole = json.loads(text)
    stated = base64.b64decode(whole["payload"])
    for alter, expected in (
        (lambda made: made["resolvedDependencies"].pop(0), "data/raw/tiny_qa/qa.jsonl is no input of it, or not there"),
        (
            lambda made: made["externalParameters"]["parameters"].clear(),
            "it names another stage, command or parameters",
        ),
    ):
        said = json.loads(stated)
        alter(said["predicate"]["buildDefinition"])
        whole["payload"] = base64.b64encode(json.dumps(said).encode()).decode()
        path.write_text(json.dumps(whole))
        (without,) = (f for f in verify.verify(packed).findings if f.status == "FAILED")
        assert without.path == "attestations/clean@tiny_qa.json" and without.detail.startswith(expected)
    details = {f.detail for f in verify.verify(packed, key=key).findings if f.status == "FAILED"}
    path.unlink()
    gone = {f.path for f in verify.verify(packed, key=key).findings if f.status == "FAILED"}
    path.write_text(text)
    assert details == {"it is not signed with this key"}
    assert gone == {"attestations/clean@tiny_qa.json"}
    assert not [f for f in verify.verify(packed, key=key).findings if f.status == "FAILED"]


def test_nothing_of_a_statement_can_be_altered_without_a_key_either(packed: Path) -> None:
    """Commit, versions, counts and the kind of statement follow from the run record, which is in the pack, too."""
    path = packed / "attestations/clean@tiny_qa.json"
    text = path.read_text()

    def failed(payload: dict[str, Any], **changes: str) -> set[tuple[str, str]]:
        body = base64.b64encode(json.dumps(payload).encode()).decode()
        path.write_text(json.dumps({**json.loads(text), "payload": body, **changes}))
        found = {(f.path, f.detail) for f in verify.verify(packed).findings if f.status == "FAILED"}
        path.write_text(text)
        return found

    def stated() -> dict[str, Any]:
        said: dict[str, Any] = json.loads(base64.b64decode(json.loads(text)["payload"]))
        return said

    otherwise = {(f"attestations/{path.name}", f"it says otherwise than dvc.lock and metrics/runs/{path.name}")}
    assert not failed(stated())
    assert failed(stated(), payloadType="text/plain") == otherwise
    assert failed({**stated(), "_type": "https://example.org"}) == otherwise
    for alter in (
        lambda made: made["internalParameters"]["counts"].pop(),
        lambda made: made["internalParameters"]["versions"].pop(),
        lambda made: made["resolvedDependencies"][-1]["digest"].update(gitCommit="0" * 40),
    ):
        said = stated()
        alter(said["predicate"]["buildDefinition"])
        assert failed(said) == otherwise
    stranger = path.with_name("clean@nobody.json")
    stranger.write_text(text)
    assert failed(stated()) == {("attestations/clean@nobody.json", "it is of no stage that dvc.lock names")}
    stranger.unlink()


def test_a_statement_names_stage_inputs_outputs_code_and_commit(packed: Path) -> None:
    whole = json.loads((packed / "attestations/tokenize_text@tiny_qa.json").read_text())
    assert whole["payloadType"] == "application/vnd.in-toto+json"
    said = json.loads(base64.b64decode(whole["payload"]))
    assert (said["_type"], said["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    assert {one["name"].rsplit("/", 1)[0] for one in said["subject"]} == {"data/tokens/chat/tiny_qa"}
    names = {one["name"] for one in said["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {"git", "stages/tokenize_text.py", "models/tokenizers/chat/tokenizer.json"} <= names
    assert "data/marked/chat/tiny_qa/data-00000.arrow" in names


def test_without_a_key_it_is_not_signed_and_a_wrong_one_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert not pack(finished, tmp_path / "plain.tar")[2]
    report = verify.Report()
    verify.check_attestations(verify.Project(finished, None), report, bytes(32))
    assert [finding.detail for finding in report.findings] == ["a key was given, but there are none"]
    (tmp_path / "key.pem").write_text("no key")
    monkeypatch.setenv(KEY, str(tmp_path / "key.pem"))
    with pytest.raises(SystemExit, match="is no private key in PEM"):
        pack(finished, tmp_path / "plain.tar")
    pem(ec.generate_private_key(ec.SECP256R1()), tmp_path / "key.pem")
    with pytest.raises(SystemExit, match="is no ed25519 key; make one"):
        pack(finished, tmp_path / "plain.tar")


def test_signatures_of_rfc_8032() -> None:
    """Section 7.1, tests 1 and 2."""
    for key, message, signature in (
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ):  # fmt: skip
        public, said, whole = map(bytes.fromhex, (key, message, signature))
        assert verify.is_signed(public, said, whole)
        # The same number plus the order of the group, and a point written otherwise, are no second signature.
        more = (int.from_bytes(whole[32:], "little") + verify.ED_L).to_bytes(32, "little")
        assert not verify.is_signed(public, said, whole[:32] + more)
    assert verify._point((1).to_bytes(32, "little")) and not verify._point((verify.ED_P + 1).to_bytes(32, "little"))


@settings(max_examples=15)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200), st.integers(0, 511))
def test_signatures_are_those_of_cryptography_and_no_flipped_bit_passes(seed: bytes, message: bytes, bit: int) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = private.public_key().public_bytes_raw(), private.sign(message)
    assert verify.is_signed(public, message, signature)
    flipped = bytearray(signature)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not verify.is_signed(public, message, bytes(flipped))
    assert not verify.is_signed(public, message + b"x", signature)
    assert not verify.is_signed(OTHER.public_key().public_bytes_raw(), message, signature)
