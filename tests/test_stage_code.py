"""kit/stage_code.py: the code and the libraries of a stage are those that its import statements name."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from conftest import ROOT, write
from kit import stage_code


def test_code_files_are_the_imports_at_any_depth(here: Path) -> None:
    """Every form of import is followed, also inside functions; other modules are not ours."""
    write(here / "stages/one.py", "import os\nimport two as t\nfrom kit import digests\nimport yaml.nodes\n")
    write(here / "stages/two.py", "def f():\n    try:\n        pass\n    finally:\n        from three import name\n")
    with (here / "stages/two.py").open("a") as file:
        file.write("    match f:\n        case None:\n            import kit.five\n")
    write(here / "stages/three.py", "from kit.four import name\nimport one\n")
    for name in ("kit/four", "kit/five", "six"):
        write(here / f"stages/{name}.py", "")
    found = [path.relative_to(here / "stages").as_posix() for path in stage_code.code_files(here / "stages/one.py")]
    assert found == ["kit/digests.py", "kit/five.py", "kit/four.py", "one.py", "three.py", "two.py"]
    before = stage_code.code_digests(here / "stages/one.py")
    write(here / "stages/six.py", "changed = True\n")
    assert stage_code.code_digests(here / "stages/one.py") == before
    write(here / "stages/kit/four.py", "changed = True\n")
    assert stage_code.code_digests(here / "stages/one.py") != before


def test_versions_follow_from_the_code_alone(here: Path) -> None:
    """What another module happened to import before must not decide whether work is known: two runs would differ."""
    write(here / "stages/one.py", "import two\n")
    write(here / "stages/two.py", "def f():\n    import jinja2\n    import not_installed\n")
    importlib.import_module("numpy")
    assert list(stage_code.versions(here / "stages/one.py")) == ["python", "jinja2"]
    write(here / "stages/three.py", "def f():\n    import torch\n")
    names = {"python", "torch", "accelerate", "bitsandbytes", "peft", "safetensors"}
    assert set(stage_code.versions(here / "stages/three.py")) == names


def test_every_library_that_shapes_tokens_is_known() -> None:
    found = [set(stage_code.versions(ROOT / f"stages/{name}.py")) for name in ("tokenize_text", "add_bos_eos")]
    every = {"python", "numpy", "pyarrow", "tokenizers"}
    assert found == [every | {"gigatoken"}, every | {"jinja2"}]


def test_what_a_module_imports_is_remembered_by_its_text(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text is read anew, whatever size and times it has; all is, where the note or the reader is another."""
    script, note = here / "stages/one.py", here / ".work/imports/one.json"
    write(script, "import two")
    write(here / "stages/two.py", "")
    write(here / "stages/six.py", "")
    (here / ".work").mkdir(exist_ok=True)

    def files() -> list[str]:
        stage_code._imports.cache_clear()
        return [path.name for path in stage_code.code_files(script)]

    assert files() == ["one.py", "two.py"]
    assert note.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(stage_code, "_imported", lambda text: pytest.fail("read again"))
        assert files() == ["one.py", "two.py"]
        patch.setattr(stage_code, "__file__", str(script))
        patch.setattr(stage_code, "_imported", lambda text: ["six"])
        assert files() == ["one.py", "six.py"]
    assert files() == ["one.py", "two.py"]
    before = script.stat()
    write(script, "import six")
    os.utime(script, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files() == ["one.py", "six.py"]
    content = note.read_bytes()
    assert b'["six"]' in content
    note.write_bytes(content.replace(b'["six"]', b'["two"]'))
    assert files() == ["one.py", "six.py"]
    note.write_bytes(b"no note at all")
    assert files() == ["one.py", "six.py"]


@pytest.mark.parametrize("name", [*stage_code.SHAPING, "not-installed", "ruamel.yaml"])
def test_version_is_what_importlib_says(name: str) -> None:
    import importlib.metadata

    try:
        wanted = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        wanted = None
    assert stage_code.version(name) == wanted


def test_version_of_two_installations_is_what_importlib_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first on the path counts, for it is the one that is imported."""
    import importlib.metadata

    for place, number in (("first", "1.2"), ("second", "3.4")):
        write(tmp_path / place / f"twice-{number}.dist-info/METADATA", f"Name: twice\nVersion: {number}\n")
        monkeypatch.syspath_prepend(tmp_path / place)
    assert stage_code.version("twice") == importlib.metadata.version("twice") == "3.4"
