"""import_base: a model at one commit, or one sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import save

import tiny
from conftest import Runner
from import_base import Params
from test_text_part import composite, loaded, logits

COMMIT = "4f42c91d806a19ae1a46af6c3fb5f4990d884cd6"


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12]])
def test_only_a_full_commit_will_do(revision: str) -> None:
    """A branch or tag would be another model tomorrow, under the same name."""
    with pytest.raises(ValidationError, match="revision"):
        Params(repo_id="owner/name", revision=revision)


@pytest.mark.slow  # it tries again and again
def test_without_a_connection_one_sentence_and_the_old_base_stays(project: Path, run_stage: Runner) -> None:
    tiny.base(project / "models/configs/tiny")
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny"})
    content = json.loads((project / "params.yaml").read_text())
    content["bases"] = {"small": {"repo_id": "owner/name", "revision": COMMIT}}
    (project / "params.yaml").write_text(json.dumps(content))
    old = project / "models/base/small"
    old.mkdir(parents=True)
    (old / "keep").write_text("old")
    # A closed port of this machine stands for a Hub out of reach.
    # kit.model, which other tests import, says 1 to this process and to those that it starts
    done = run_stage(
        project,
        "import_base",
        "small",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_CACHE=str(project / "hub"),
        HF_HUB_OFFLINE="0",
    )
    assert done.returncode == 1
    assert "import_base@small: owner/name at 4f42c91d806a could not be fetched" in done.stderr
    assert "Traceback" not in done.stderr
    assert (old / "keep").read_text() == "old"


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": save({"embedding": np.zeros((2, 2), np.float32)}),
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"never fetched: unpickling it would run code",
}


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that a download by commit asks."""

    sent: ClassVar[set[str]] = set()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/owner/name/revision/{COMMIT}"):
            content = json.dumps(
                {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            ).encode()
        elif path.startswith(f"/api/models/owner/name/tree/{COMMIT}"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
            content = json.dumps(tree).encode()
        elif path.startswith(prefix := f"/owner/name/resolve/{COMMIT}/"):
            content = FILES[path.removeprefix(prefix)]
            self.sent.add(path.removeprefix(prefix))
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if "/owner/name/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a Hub on this machine with one model at one commit."""
    Hub.sent.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def wanted(project: Path, **changes: object) -> None:
    tiny.base(project / "models/configs/tiny")
    tiny.params_yaml(project, pretrain={"base": "models/configs/tiny"})
    content = json.loads((project / "params.yaml").read_text())
    content["bases"] = {"small": {"repo_id": "owner/name", "revision": COMMIT, **changes}}
    (project / "params.yaml").write_text(json.dumps(content))


def test_a_commit_is_fetched_without_what_could_run_code(project: Path, run_stage: Runner, hub: str) -> None:
    wanted(project)
    done = run_stage(
        project, "import_base", "small", HF_ENDPOINT=hub, HF_HUB_CACHE=str(project / "hub"), HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 0, done.stderr
    folder = project / "models/base/small"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in FILES.items() if not name.endswith(".bin")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"revision": "0" * 40}, "import_base@small: owner/name at 000000000000 could not be fetched"),
        ({"repo_id": "owner/nothing"}, "import_base@small: the Hub has no model owner/nothing that you may read"),
    ],
)
def test_what_the_hub_has_not_is_one_sentence(
    project: Path, run_stage: Runner, hub: str, changes: dict[str, str], sentence: str
) -> None:
    wanted(project, **changes)
    done = run_stage(
        project, "import_base", "small", HF_ENDPOINT=hub, HF_HUB_CACHE=str(project / "hub"), HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not (project / "models/base/small").exists()


def test_a_model_that_is_no_base_is_refused_at_once(
    project: Path, run_stage: Runner, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    monkeypatch.setitem(FILES, "config.json", json.dumps(quantised).encode())
    wanted(project)
    done = run_stage(
        project, "import_base", "small", HF_ENDPOINT=hub, HF_HUB_CACHE=str(project / "hub"), HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 1
    assert "\nimport_base@small: owner/name holds weights that were quantised (gptq), which can" in done.stderr
    assert not (project / "models/base/small").exists()
    assert Hub.sent == {"config.json"}, "what its config says is known before the weights are fetched"


@pytest.mark.parametrize(
    ("kind", "asked", "sentence"),
    [
        ("gemma3", {}, "owner/name is of type gemma3, which reads more than text; set bases.small.text_only to true"),
        ("qwen3_vl", {"text_only": True}, "owner/name: transformers has no causal model of type qwen3_vl_text"),
        ("llama", {"text_only": True}, "owner/name is a language model and has no other part; take it as it is"),
    ],
)
def test_what_cannot_be_a_base_as_it_was_asked_for_is_said_before_its_weights_are_fetched(
    project: Path,
    run_stage: Runner,
    hub: str,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    asked: dict[str, bool],
    sentence: str,
) -> None:
    parts = {} if kind == "llama" else {"text_config": {}}
    monkeypatch.setitem(FILES, "config.json", json.dumps({"model_type": kind, **parts}).encode())
    wanted(project, **asked)
    done = run_stage(
        project, "import_base", "small", HF_ENDPOINT=hub, HF_HUB_CACHE=str(project / "hub"), HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 1
    assert f"import_base@small: {sentence}" in done.stderr and "Traceback" not in done.stderr
    assert Hub.sent == {"config.json"}
    assert not list((project / "models/base").iterdir())


def test_the_language_model_of_a_model_of_several_parts(
    project: Path,
    run_stage: Runner,
    hub: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = tmp_path_factory.mktemp("hub")
    whole = composite("gemma3", source / "whole", max_shard_size="40KB")
    monkeypatch.delitem(FILES, "model.safetensors")
    for path in (source / "whole").iterdir():
        monkeypatch.setitem(FILES, path.name, path.read_bytes())
    wanted(project, text_only=True)
    done = run_stage(
        project, "import_base", "small", HF_ENDPOINT=hub, HF_HUB_CACHE=str(project / "hub"), HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 0, done.stderr
    base = project / "models/base/small"
    assert torch.equal(logits(loaded(base)), logits(whole))
    assert [path.name for path in (project / "models/base").iterdir()] == ["small"], "of the whole model nothing stays"
    (counts,) = json.loads((project / "metrics/runs/import_base@small.json").read_text())["counts"]
    assert counts == {"tensors": 28, "left_out": 34, "files": sum(path.is_file() for path in base.iterdir())}
