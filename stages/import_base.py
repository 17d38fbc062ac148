"""Fetch a model of the Hugging Face Hub at one commit, as the base of a phase.

Reads:  the Hub, through huggingface_hub
Writes: models/base/NAME   config, safetensors weights and tokenizer, as they are at that commit
Params: bases.NAME

Example:

    bases: {bloom: {repo_id: bigscience/bloom-560m, revision: 4f42c91d806a19ae1a46af6c3fb5f4990d884cd6}}
    phases: {chat: {base: models/base/bloom, ...}}
"""

from __future__ import annotations

import shutil

from pydantic import BaseModel, ConfigDict, Field

from kit import stage
from kit.base import check_base, has_weights
from kit.params import read_params

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]


class Params(BaseModel):
    """`bases.NAME`: which model, at which commit."""

    model_config = ConfigDict(extra="forbid")

    repo_id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on the Hub")
    revision: str = Field(
        pattern=r"^[0-9a-f]{40}$", description="full commit hash: a branch would be another model tomorrow"
    )


def main(name: str) -> None:
    params = read_params(f"bases.{name}", Params)
    with stage.run("import_base", name, [], [f"models/base/{name}"]) as run:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        (folder,) = run.outputs
        try:
            snapshot_download(params.repo_id, revision=params.revision, allow_patterns=FILES, local_dir=folder)
        except RepositoryNotFoundError:
            raise SystemExit(f"{run.name}: the Hub has no model {params.repo_id} that you may read.") from None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(
                f"{run.name}: {params.repo_id} at {params.revision[:12]} could not be fetched ({reason}); "
                "check the connection and the commit, and run again."
            ) from None
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's own notes, with times in them
        if not (folder / "config.json").is_file() or not has_weights(folder):
            raise SystemExit(
                f"{run.name}: {params.repo_id} has no config.json with safetensors weights at that commit."
            )
        try:
            check_base(folder)
        except SystemExit as error:
            raise SystemExit(f"{run.name}: {str(error).replace(str(folder), params.repo_id)}") from None
        run.count(files=sum(path.is_file() for path in folder.rglob("*")))


if __name__ == "__main__":
    stage.cli(main, __doc__)
