"""The blocks of a phase as a Croissant 1.1 description, with their provenance in PROV-O: the part of describe_model.

    {"@type": "sc:Dataset", "name": "chat-blocks", "distribution": [{"@type": "cr:FileObject", "sha256": ...}, ...],
     "recordSet": [...], "prov:wasDerivedFrom": [{"@id": "urn:terroir:source:python_qa", ...}], ...}

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html. Files are named relative to the root of the project.
The address, a citation and the day of publication are for those to add who publish the blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit import arrow

TERMS = (
    "citeAs", "column", "dataType", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet",
    "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references",
    "regex", "repeated", "replace", "samplingRate", "sdVersion", "separator", "source", "subField", "transform",
)  # fmt: skip
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in TERMS},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
}
COLUMNS = {
    "input_ids": ("sc:Integer", "token ids of a block"),
    "learn": ("sc:Boolean", "whether a token is learned"),
    "starts": ("sc:Integer", "where each document of a block begins and, last, where padding does"),
}
ARROW = "application/vnd.apache.arrow.stream"


def describe(phase: str, entries: list[dict[str, Any]], grouping: dict[str, Any], digest: str) -> dict[str, Any]:
    """Return the description of data/blocks/PHASE. entries: of the source register; digest: of the folder."""
    files, records = [], []
    for split in ("train", "eval"):
        folder = Path("data/blocks", phase, split)
        manifest = arrow.manifest(folder)
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            files.append(
                {
                    "@type": "cr:FileObject",
                    "@id": f"{split}/{shard['name']}",
                    "name": f"{split}-{shard['name']}",
                    "contentUrl": path.as_posix(),
                    "contentSize": f"{path.stat().st_size} B",
                    "encodingFormat": ARROW,
                    "sha256": shard["sha256"],
                }
            )
        files.append(
            {
                "@type": "cr:FileSet",
                "@id": f"{split}-shards",
                "name": f"{split}-shards",
                "containedIn": [{"@id": f"{split}/{shard['name']}"} for shard in manifest["shards"]],
                "encodingFormat": ARROW,
                "includes": (folder / "*.arrow").as_posix(),
            }
        )
        fields = [
            {
                "@type": "cr:Field",
                "@id": f"{split}/{column}",
                "name": f"{split}/{column}",
                "description": COLUMNS[column][1],
                "dataType": COLUMNS[column][0],
                "repeated": True,
                "source": {"fileSet": {"@id": f"{split}-shards"}, "extract": {"column": column}},
            }
            for column in sorted(manifest["schema"])
        ]
        count = manifest["counts"]["rows"]
        about = f"{count:,} blocks of {grouping['block_size']} tokens, the {split} split"
        records.append({"@type": "cr:RecordSet", "@id": split, "name": split, "description": about, "field": fields})
    licences = sorted({entry["license"] for entry in entries})
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": f"{phase}-blocks",
        "description": f"The blocks on which the model of phase {phase} was trained and evaluated, as token ids.",
        "url": f"urn:sha256:{digest}",
        "version": "1.0.0",
        "license": licences,
        "creator": [
            {"@type": "sc:Organization", "name": name} for name in sorted({entry["owner"] for entry in entries})
        ],
        "inLanguage": sorted({entry["language"] for entry in entries} - {"unknown"}),
        "distribution": files,
        "recordSet": records,
        "prov:wasDerivedFrom": [_source(entry) for entry in entries],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "@id": f"urn:terroir:stage:group_blocks@{phase}",
            "prov:label": "cleaned, deduplicated, tokenised and grouped by Terroir",
        },
    }


def _source(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "prov:Entity",
        "@id": f"urn:terroir:source:{entry['source']}",
        "prov:label": entry["origin"],
        "license": entry["license"],
        "prov:wasAttributedTo": {"@type": "prov:Agent", "prov:label": entry["owner"]},
    }
