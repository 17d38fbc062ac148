"""`make serve` answers the openai client and `make chat` talks in the terminal, with the model of a finished run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, wait_for

MISSING = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
SECONDS = 600  # a shared machine takes minutes for what takes a quiet one 15 s

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install '.[serve]')"),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def recipe(target: str, port: int) -> str:
    """Return the shell line of a target of the Makefile, without what it needs first."""
    command = ["make", "--no-print-directory", "-n", target, "PHASE=chat", f"PORT={port}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = printed.replace("\\\n", "")[printed.replace("\\\n", "").index("HF_HUB_OFFLINE=1") :]
    script = f"{shlex.quote(sys.executable)} -m transformers.cli.transformers"
    return line.replace("transformers serve", f"{script} serve").replace("transformers chat", f"{script} chat")


@pytest.fixture
def server(workspace: Path) -> Iterator[str]:
    """The address of `make serve PHASE=chat`, once it answers."""
    (workspace / ".work/hub").mkdir(exist_ok=True)
    port = free_port()
    started = subprocess.Popen(["sh", "-c", f"exec env {recipe('serve', port)}"], cwd=workspace)
    try:
        deadline = time.monotonic() + SECONDS
        while not answers(port):
            assert started.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        started.kill()
        started.wait()


def answers(port: int) -> bool:
    """Return whether a server says that it is well."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
    except OSError:
        return False


def test_the_openai_client_gets_the_pipelines_answer(workspace: Path, server: str) -> None:
    """Greedily, the answer of transformers' own pipeline; streamed, the same in pieces."""
    from openai import OpenAI
    from transformers import pipeline

    client = OpenAI(base_url=server, api_key="none", max_retries=0, timeout=SECONDS)
    asked: Any = [{"role": "user", "content": "How long is the Rhine?"}]
    options: Any = {"model": "models/chat/merged", "messages": asked, "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**options)
    generate = pipeline("text-generation", model=str(workspace / "models/chat/merged"))
    expected = generate(asked, do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None and answer.usage.completion_tokens <= 8
    parts = [part.choices[0].delta.content or "" for part in client.chat.completions.create(stream=True, **options)]
    assert "".join(parts) == expected
    assert client.models.list().object == "list"


def test_a_chat_does_not_talk_to_a_server_that_is_there_already(workspace: Path) -> None:
    """It may be of another project; its answers would be taken for those of this model."""
    command = ["make", "--no-print-directory", "-n", "chat", "PHASE=chat", f"PORT={(port := free_port())}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    (line,) = (line for line in printed.splitlines() if "create_connection" in line)
    ask = ["sh", "-c", line.replace("python", shlex.quote(sys.executable), 1)]
    assert subprocess.run(ask, cwd=workspace, check=False).returncode == 0
    with socket.socket() as one:
        one.bind(("127.0.0.1", port))
        one.listen()
        done = subprocess.run(ask, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.endswith(f"perhaps with another model; make chat PORT={port + 1}\n")


@pytest.mark.parametrize("end", ["!exit", "Ctrl-C"])
def test_a_chat_in_the_terminal(workspace: Path, end: str) -> None:
    """What a user types is answered; `!exit` or Ctrl-C ends the chat and, without any help, the server."""
    (workspace / ".work/hub").mkdir(exist_ok=True)
    (workspace / ".work/serve.log").unlink(missing_ok=True)
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with subprocess.Popen(
        ["sh", "-c", recipe("chat", port)],
        cwd=workspace,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as chat:
        try:
            if end == "Ctrl-C":  # while the server starts and has no handler of its own yet
                wait_for((workspace / ".work/serve.log").is_file)
                os.killpg(chat.pid, signal.SIGINT)
                chat.communicate(timeout=SECONDS)
            else:
                said, _ = chat.communicate("How long is the Rhine?\n!exit\n", timeout=SECONDS)
                assert "CHAT INTERFACE" in said and "tok/s" in said, said
            with pytest.raises(ProcessLookupError):
                os.killpg(chat.pid, 0)  # nothing of it runs any more
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(chat.pid, signal.SIGKILL)
