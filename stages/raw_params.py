"""How the files of a source become records: the keys in params.yaml; formats, their columns and file names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raw_records import COMPRESSIONS

SUFFIXES: dict[str, tuple[str, ...]] = {
    name: tuple(suffix + packed for suffix in suffixes for packed in ("", *COMPRESSIONS))
    for name, suffixes in {
        "text": (".txt", ".md", ".markdown"),
        "jsonl": (".jsonl", ".ndjson", ".json"),  # much JSON of one object a line is called .json
        **{name: (f".{name}",) for name in ("json", "csv", "tsv", "parquet", "arrow", "pdf", "docx")},
        "html": (".html", ".htm"),
    }.items()
}
UNITS = {"parquet": "row", "arrow": "row", "pdf": "page", "docx": "paragraph"}  # all others: line
WHOLE = (("pdf", "document"), ("docx", "document"))  # all pages or paragraphs of a file are one record
DELIMITERS = {"csv": ",", "tsv": "\t"}
# The columns of each kind of row: those that it must have, and those that it may have.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ()),
    "alpaca": (("instruction", "input", "output"), ("system", "history", "kto_tag")),
    "messages": (("messages",), ("system", "tools", "kto_tag")),
    "sharegpt": (("conversations",), ("system", "tools", "kto_tag")),
    "prompt_completion": (("prompt", "completion"), ("system", "history", "tools", "label")),
}
VERDICTS = ("label", "kto_tag")  # false: the answer is a bad one (TRL, LLaMA-Factory)
LEAVABLE = ("input",)  # of those that it must have: null in `columns` says that there is none
# Of each message in such a row: a field that it may have and that `columns` may name, too.
MESSAGE_FIELDS = dict.fromkeys(("messages", "sharegpt", "prompt_completion"), ("reasoning_content",))


class Params(BaseModel):
    """How the files of a source become records."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "pdf", "docx", "html"] = Field(
        description="jsonl: one JSON object a line; json: an array of objects, or one; arrow: one file, or a folder of "
        "`save_to_disk`; html: the file is a record, as its visible text; pdf, docx: see sample_by"
    )
    record: Literal["text", "alpaca", "messages", "sharegpt", "prompt_completion"] = Field(
        "text", description="what a row is: a text in the column `text`, or a conversation (not text, pdf, docx, html)"
    )
    sample_by: Literal["document", "line", "separator"] | None = Field(
        None,
        description="document: one file is one record; line, separator: each line is, or each part from a `separator`, "
        "of format text. When not given: the file; of a pdf each page, of a docx each paragraph or table",
    )
    separator: str | None = Field(
        None,
        description="sample_by separator only: regular expression (^ and $ at each line, of LF or CR LF), each match "
        "begins a document and stays in it, e.g. `^# `",
    )
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="of csv and tsv: what separates fields; null: a comma, or a tab"
    )
    quotechar: str | None = Field(
        '"',
        min_length=1,
        max_length=1,
        description="of csv and tsv: what may stand around a field, which may then hold line ends; null: nothing may, "
        "quotes are text and each line is a row",
    )
    columns: dict[str, str | None] = Field(
        {},
        description="standard name -> name in the file, e.g. {text: body} or {instruction: question}; null: not read, "
        "of what may be missing, e.g. {tools: null} or, of alpaca, {input: null}",
    )
    encoding: Literal["utf-8", "gb18030", "utf-16"] = Field(
        "utf-8", description="of text, jsonl, json, csv, tsv and html; utf-16 must begin with its byte order mark"
    )
    fill: dict[str, str] = Field(
        {}, description="placeholder -> value: {name: Terra} puts Terra where the content says {{name}} or {{ name }}"
    )

    @model_validator(mode="after")
    def _agree(self) -> Params:
        known = [*(name for names in COLUMNS[self.record] for name in names), *MESSAGE_FIELDS.get(self.record, ())]
        if self.format in ("text", "pdf", "docx", "html") and (self.record != "text" or self.columns):
            raise ValueError(f"format {self.format} has no rows; `record` and `columns` are for formats that have")
        if self.format in ("csv", "tsv") and self.record in ("messages", "sharegpt"):
            raise ValueError(f"a cell of {self.format} is a text, and record {self.record} needs lists; use jsonl")
        if self.sample_by and self.format != "text" and (self.format, self.sample_by) not in WHOLE:
            raise ValueError(f"`sample_by: {self.sample_by}` is not for format {self.format}; drop it")
        if (self.separator is None) == (self.sample_by == "separator"):
            raise ValueError("`sample_by: separator` and a `separator` go together; one of them is missing")
        if self.format in UNITS and self.encoding != "utf-8":
            raise ValueError(f"format {self.format} knows its own encoding; drop `encoding`")
        for key in ("delimiter", "quotechar"):
            if key in self.model_fields_set and self.format not in ("csv", "tsv"):
                raise ValueError(f"`{key}` is for csv and tsv; format {self.format} has none")
            if getattr(self, key) in ("\r", "\n", "\0"):
                raise ValueError(f"`{key}` cannot be a line end or NUL; name the sign that stands in the file")
        if self.quotechar and self.quotechar == (self.delimiter or DELIMITERS.get(self.format)):
            raise ValueError(f"{self.quotechar!r} cannot be both what separates fields and what stands around them")
        read = {name: self.columns.get(name, name) for names in COLUMNS[self.record] for name in names}
        for name, column in self.columns.items():
            if others := [one for one in read if one != name and name in read and column and read[one] == column]:
                raise ValueError(
                    f"`columns` reads `{column}` as `{name}` and as `{others[0]}`; give each its own, or null for one"
                )
            if name not in known:
                raise ValueError(f"`columns` names `{name}`, but record {self.record} reads {', '.join(known)}")
            if column is None and name in COLUMNS[self.record][0] and name not in LEAVABLE:
                raise ValueError(f"`columns` leaves out `{name}`, which record {self.record} needs")
        for name in self.fill:
            if not re.fullmatch(r"[^{}]+", name) or name != name.strip():
                raise ValueError(f"`fill` names `{name}`; write the name without its braces and blanks")
        try:
            if self.separator is not None and re.search(self.separator, "", re.MULTILINE):
                raise ValueError(f"the separator {self.separator} matches the empty text, so it would cut anywhere")
        except re.error as error:
            raise ValueError(f"the separator {self.separator} is not a regular expression ({error})") from None
        return self


def unit(params: Params) -> str:
    """Return what `Record.number` counts: line, row, page or paragraph."""
    return UNITS.get(params.format, "line")


def cuttable(path: Path, params: Params) -> bool:
    """Return whether each line of the file is a record whatever stands in the lines around it, at a known place."""
    by_line = params.format == "jsonl" or (params.format == "text" and params.sample_by == "line")
    return by_line and params.encoding != "utf-16" and path.suffix.lower() not in COMPRESSIONS
