"""Write the documentation that every CPython carries as reference text and as question and answer rows.

It is the default corpus: real prose, a domain of its own, and no download. Docstrings are read with `ast`
from the sources of the standard library, so no module runs; of C code, a few modules are asked.

Reads: the running Python (`pydoc_data.topics`, the standard library's .py files); nothing in the repository.
Writes: data/raw/NAME_reference/topics/*.txt (a topic of the language reference each) and modules/*.txt (a
module each); data/raw/NAME_qa/questions.jsonl (columns instruction, input, output). All is UTF-8 with
LF; the bytes depend on the Python version alone, not on platform, path, clock or hash seed.
Params: imports.NAME.questions_per_entry.

Example, from a source tea.py to modules/tea.txt and to one row of questions.jsonl:

    def brew(leaf, minutes=3):                 ->    function tea.brew(leaf, minutes=3)
        "Steep the leaves in water                   Steep the leaves in water
        that has just boiled.                        that has just boiled.
        Stir once, then wait."                       Stir once, then wait.

    {"instruction": "In one sentence, what is the function `tea.brew` for?", "input": "",
     "output": "Steep the leaves in water that has just boiled."}
"""

import ast
import builtins
import hashlib
import importlib
import inspect
import itertools
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from kit import stage
from kit.params import read_params

# Tests, tables, demonstrations.
NOT_DOCUMENTATION = {"encodings", "pydoc_data", "test", "tests", "turtledemo"}
# Distributions leave these out or package them apart: the corpus would follow what happens to be installed.
OFTEN_MISSING = {"distutils", "ensurepip", "idlelib", "lib2to3", "macholib", "msilib", "tkinter", "turtle"}
SKIPPED = NOT_DOCUMENTATION | OFTEN_MISSING
C_MODULES = ("builtins", "cmath", "gc", "itertools", "math")  # always there, the same on every platform
# In characters. A third of all docstrings is shorter than 60 and mostly restates a name ("Return the mode.").
# An answer of 600 is about 150 tokens: with its question and the chat template it fits a block of 512.
SHORTEST_TEXT, SHORTEST_ANSWER, LONGEST_ANSWER = 60, 40, 600
FULL_PYTHON = "use a full CPython, such as uv's, pyenv's or Debian's package python3, and install again."


class Params(BaseModel):
    """Parameters of one entry of `imports:`."""

    model_config = ConfigDict(extra="forbid")

    questions_per_entry: int = Field(
        description="question forms per documented thing; more forms repeat the same answers", ge=1, le=6
    )


class Entry(NamedTuple):
    """One documented thing: kind as in "method", dotted name, signature "(a, b=1)" or "", cleaned text."""

    kind: str
    name: str
    signature: str
    text: str

    @property
    def header(self) -> str:
        return f"{self.kind} {self.name}{self.signature}"


class Form(NamedTuple):
    """One way to ask: {kind}, {name}, {header} are filled in; the answer has up to `longest` characters."""

    instruction: str
    input: str
    longest: int


SIGNATURE = 0  # in place of a length: the answer is the signature
FORMS = (
    Form("What is the {kind} `{name}` for?", "", LONGEST_ANSWER),
    Form("In one sentence, what is the {kind} `{name}` for?", "", 1),
    Form("How does the Python documentation describe the {kind} `{name}`?", "", LONGEST_ANSWER),
    Form("Briefly explain the Python {kind} `{name}`.", "", 250),
    Form("Describe this {kind}.", "{header}", LONGEST_ANSWER),
    Form("What is the signature of the {kind} `{name}`?", "", SIGNATURE),
)
TOPIC_FORMS = (
    Form("What does the Python language reference say about this topic: {name}", "", LONGEST_ANSWER),
    Form("Explain this part of the Python language: {name}", "", LONGEST_ANSWER),
    Form("Briefly introduce this topic of the Python language: {name}", "", 250),
    Form("In one sentence, how does the Python language reference open this topic: {name}", "", 1),
    Form("Explain this topic of the Python language.", "{name}", LONGEST_ANSWER),
)


def module_sources(library: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, path of the source) of the public modules under `library`, sorted by name."""
    found = []
    # stdlib_module_names keeps out what others put there, such as sitecustomize and site-packages.
    for package in sys.stdlib_module_names - SKIPPED:
        for path in [library / f"{package}.py", *(library / package).rglob("*.py")]:
            parts = path.relative_to(library).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            private = any(part.startswith("_") and part != "__future__" for part in parts)
            if path.is_file() and not private and SKIPPED.isdisjoint(parts):
                found.append((".".join(parts), path))
    yield from sorted(found)


def is_public(name: str) -> bool:
    """Say whether a name is public; special methods such as __init__ are."""
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def source_entries(module: str, source: bytes) -> list[Entry]:
    """Return the documented public parts of a module in source order, the module itself first.

    Of two definitions with one name (in `if` and `else`), the first with a docstring counts.
    """
    entries: dict[str, Entry] = {}

    def visit(body: Iterable[ast.AST], scope: str, inside_class: bool) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{scope}.{node.name}"
                if is_public(node.name) and (text := ast.get_docstring(node)):
                    kind = kind_of(node, inside_class)
                    entries.setdefault(name, Entry(kind, name, signature_of(node, kind), text))
                if is_public(node.name) and isinstance(node, ast.ClassDef):
                    visit(node.body, name, True)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                visit(ast.iter_child_nodes(node), scope, inside_class)

    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        entries[module] = Entry("module", module, "", text)
    visit(tree.body, module, False)
    return list(entries.values())


def kind_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, inside_class: bool) -> str:
    """Return the word for a definition: class, property, function, method, async function or async method."""
    if isinstance(node, ast.ClassDef):
        return "class"
    if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
        return "property"
    word = "method" if inside_class else "function"
    return f"async {word}" if isinstance(node, ast.AsyncFunctionDef) else word


def signature_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> str:
    """Return "(a, b=1)" with defaults as written, a class's bases in parentheses, or "" for a property."""
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    return "" if kind == "property" else f"({ast.unparse(node.args)})"


def compiled_entries(module: str) -> list[Entry]:
    """Return the documented public functions, classes and methods of a C module, sorted by name."""
    entries: list[Entry] = []

    def add(kind: str, name: str, thing: object) -> None:
        if isinstance(thing, type):
            signature = f"({', '.join(base.__name__ for base in thing.__bases__)})".replace("(object)", "")
        else:
            signature = text_signature(thing)
        if text := inspect.cleandoc(getattr(thing, "__doc__", None) or ""):
            entries.append(Entry(kind, name, signature, text))

    loaded = importlib.import_module(module)
    prefix = "" if loaded is builtins else f"{module}."
    add("module", module, loaded)
    for name, value in sorted(vars(loaded).items()):
        # Aliases are skipped (WindowsError, on Windows only), and help and exit, objects that `site` adds.
        if name.startswith("_") or getattr(value, "__name__", "") != name:
            continue
        if isinstance(value, type):
            add("class", prefix + name, value)
            for method in sorted(vars(value)):
                if not method.startswith("_") and inspect.isroutine(getattr(value, method)):
                    add("method", f"{prefix}{name}.{method}", getattr(value, method))
        elif inspect.isroutine(value):
            add("function", prefix + name, value)
    return entries


def text_signature(thing: object) -> str:
    """Return the signature that a C function declares, as "(x, /)", or "" where it declares none."""
    try:
        return str(inspect.signature(thing))  # type: ignore[arg-type]  # raises TypeError for what is not callable
    except (TypeError, ValueError):
        return ""


def sections(topic: str) -> list[Entry]:
    """Split a language topic at its underlined headings into entries of the kind "topic"."""
    parts = re.split(r"^(\S.*)\n[*=~-]{3,}\n", topic, flags=re.MULTILINE)
    return [Entry("topic", name, "", text) for name, text in zip(parts[1::2], parts[2::2], strict=True)]


# An indented line, a list item, a field, a rule, a doctest, grammar or a table ends the prose of a text.
NOT_PROSE = re.compile(
    r"^[ \t>|]|^[-*+#]( |$)|^\(?\w{1,2}[.)] |^[:@]\w|^[-=~*#+.]{3}|::=|[-=]>|\) = | {3}|\$Id", re.MULTILINE
)
CALL = re.compile(r"^(class )?[\w.]+\(.*?\)( *->.*| *:)?$", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.) +(?=[\"'`*(]?[A-Z])")
VAGUE = re.compile(r"^\W*(see|alias|deprecated|helper)\b", re.IGNORECASE)  # says nothing of the thing itself


def prose(text: str) -> list[str]:
    """Return the sentences of a text up to its first list, table or example; joined, they are the prose.

    Lines are unwrapped; a sentence carries the space or blank line before it. Calls on top are passed over.
    """
    sentences: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        only_calls = not CALL.sub("", block).strip()
        if only_calls and not sentences:
            continue
        if only_calls or NOT_PROSE.search(block):
            # "..., is equivalent to" has lost what it leads to; a one-line summary may lack its full stop.
            if len(sentences) > 1 and sentences[-1][-1] not in ".!?:":
                sentences.pop()
            break
        line = " ".join(re.sub(r"(?<=\w)-\n(?=\w)", "-", block).split())
        first, *others = SENTENCE_END.split(line)
        sentences += ["\n\n" + first if sentences else first, *(" " + other for other in others)]
        if line.endswith(":"):
            break  # what follows is a list or an example, indented or not
    return sentences


def quote(sentences: list[str], longest: int) -> str:
    """Return the first sentence and those after it up to `longest` characters; "" if unfit as an answer."""
    fitting = sum(length <= longest for length in itertools.accumulate(map(len, sentences)))
    taken = sentences[: max(1, fitting)]
    if taken and taken[-1].endswith(":"):
        taken.pop()
    answer = "".join(taken)
    return answer if SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER and not VAGUE.search(answer) else ""


def question_rows(entries: Iterable[Entry], questions_per_entry: int) -> list[dict[str, str]]:
    """Return Alpaca rows, sorted; each answer is a piece of its entry's text, unwrapped, or its signature.

    An entry's forms follow from a SHA-256 of form and name. Of entries with one text, the first counts.
    """
    rows: dict[tuple[str, str], str] = {}
    quoted: set[str] = set()
    for entry in entries:
        sentences = prose(entry.text)
        full_answer = quote(sentences, LONGEST_ANSWER)
        if len(full_answer) < SHORTEST_TEXT or full_answer in quoted:
            continue  # bytes and bytearray say the same: a copy would leak into the held-out rows
        quoted.add(full_answer)
        asked = 0
        words = {"kind": entry.kind, "name": entry.name, "header": entry.header}
        forms = TOPIC_FORMS if entry.kind == "topic" else FORMS
        for form in sorted(forms, key=lambda form: hashlib.sha256(f"{form} {entry.name}".encode()).digest()):
            question = form.instruction.format_map(words), form.input.format_map(words)
            if form.longest != SIGNATURE:
                answer = quote(sentences, form.longest)
            else:
                answer = entry.name + entry.signature if entry.signature and entry.kind != "class" else ""
            if len(answer) >= SHORTEST_ANSWER and question not in rows and asked < questions_per_entry:
                rows[question] = answer
                asked += 1
    return [{"instruction": text, "input": given, "output": answer} for (text, given), answer in sorted(rows.items())]


def library_entries(library: Path) -> dict[str, list[Entry]]:
    """Return the entries with more than a few words of text, by module name, sorted."""
    found = {module: source_entries(module, path.read_bytes()) for module, path in module_sources(library)}
    if not found:
        raise SystemExit(f"{library} holds no .py files of the standard library: {FULL_PYTHON}")
    found |= {module: compiled_entries(module) for module in C_MODULES}
    told = {module: [e for e in found[module] if len(e.text) >= SHORTEST_TEXT] for module in sorted(found)}
    return {module: entries for module, entries in told.items() if entries}


def language_topics() -> dict[str, str]:
    """Return the text of each topic of the language reference, by name."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise SystemExit(f"{sys.executable} has no module pydoc_data.topics: {FULL_PYTHON}") from None
    return dict(sorted(topics.items()))


def corpus(library: Path, questions_per_entry: int) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the reference texts by relative path, and the question rows."""
    topics = language_topics()
    modules = library_entries(library)
    texts = {f"topics/{name}.txt": text.strip() + "\n" for name, text in topics.items()}
    for module, entries in modules.items():
        blocks = [f"{entry.header}\n{entry.text}\n" for entry in entries]
        texts[f"modules/{module}.txt"] = "\n".join(blocks)
    entries = [entry for text in topics.values() for entry in sections(text)]
    entries += itertools.chain.from_iterable(modules.values())
    return texts, question_rows(entries, questions_per_entry)


def main(name: str) -> None:
    params = read_params(f"imports.{name}", Params)
    outputs = [f"data/raw/{name}_reference", f"data/raw/{name}_qa"]
    with stage.run("import_python_docs", name, inputs=[], outputs=outputs) as run:
        reference, qa = run.outputs
        texts, rows = corpus(Path(sysconfig.get_path("stdlib")), params.questions_per_entry)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files = {reference / path: text for path, text in texts.items()} | {qa / "questions.jsonl": lines}
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
        size = sum(path.stat().st_size for path in files)
        run.count(files=len(files), documents=len(texts), bytes=size, questions=len(rows))


if __name__ == "__main__":
    stage.cli(main, __doc__)
