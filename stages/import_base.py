"""Fetch a model of the Hugging Face Hub at one commit, as the base of a phase.

Reads:  the Hub, through huggingface_hub
Writes: models/base/NAME   config, safetensors weights and tokenizer, as they are at that commit
Params: bases.NAME

Of a model that also reads images or sound (Gemma 3, Qwen 3.5, Mistral 3, ...) `text_only: true` takes the language
model, its tensors byte by byte as they are there (stages/text_part.py).

Example:

    bases: {bloom: {repo_id: bigscience/bloom-560m, revision: 4f42c91d806a19ae1a46af6c3fb5f4990d884cd6}}
    phases: {chat: {base: models/base/bloom, ...}}
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

import text_part
from kit import stage
from kit.base import check_whole, has_weights, read_settings, reads_more_than_text
from kit.params import read_params

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]


class Params(BaseModel):
    """`bases.NAME`: which model, at which commit."""

    model_config = ConfigDict(extra="forbid")

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the Hub")
    revision: str = Field(
        pattern=r"^[0-9a-f]{40}$", description="full commit hash: a branch would be another model tomorrow"
    )
    text_only: bool = Field(
        False, description="of a model that also reads images or sound, take the language model alone"
    )


def main(name: str) -> None:
    params = read_params(f"bases.{name}", Params)
    with (
        stage.run("import_base", name, [], [f"models/base/{name}"]) as run,
        tempfile.TemporaryDirectory(dir=run.outputs[0].parent, prefix=".tmp-whole-") as whole,
    ):
        (folder,) = run.outputs
        fetched = Path(whole) if params.text_only else folder
        try:
            download(params, fetched, ["config.json"])
            if not (fetched / "config.json").is_file():
                raise SystemExit(f"{params.repo_id} has no config.json at that commit.")
            check_kind(name, params, fetched)  # which is known before gigabytes are fetched
            download(params, fetched, FILES)
            if not has_weights(fetched):
                raise SystemExit(f"{params.repo_id} has no safetensors weights at that commit.")
            check_whole(fetched)
            if params.text_only:
                run.count(**text_part.take(fetched, folder))
        except SystemExit as error:
            raise SystemExit(f"{run.name}: {str(error).replace(str(fetched), params.repo_id)}") from None
        run.count(files=sum(path.is_file() for path in folder.rglob("*")))


def check_kind(name: str, params: Params, fetched: Path) -> None:
    """Raise SystemExit when a config.json is of a model that no phase can begin with."""
    check_whole(fetched)
    if params.text_only:
        text_part.language_model(fetched)
    elif reads_more_than_text(fetched):
        kind = read_settings(fetched / "config.json")["model_type"]
        raise SystemExit(
            f"{params.repo_id} is of type {kind}, which reads more than text; set bases.{name}.text_only to true for "
            "its language model alone."
        )


def download(params: Params, folder: Path, patterns: list[str]) -> None:
    """Write the files of a model at its commit into `folder`. Raises SystemExit when they cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(params.repo_id, revision=params.revision, allow_patterns=patterns, local_dir=folder)
    except RepositoryNotFoundError:
        raise SystemExit(f"the Hub has no model {params.repo_id} that you may read.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(
            f"{params.repo_id} at {params.revision[:12]} could not be fetched ({reason}); "
            "check the connection and the commit, and run again."
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's own notes, with times in them


if __name__ == "__main__":
    stage.cli(main, __doc__)
