"""import_python_docs: real text of this Python, the same bytes everywhere, and answers that quote it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import import_python_docs as docs
from import_python_docs import Entry

LIBRARY = Path(sysconfig.get_path("stdlib"))
STAGES = Path(docs.__file__).parent
Corpus = tuple[dict[str, str], list[dict[str, str]]]

BREW = '''
def brew(leaf, minutes=3):
    """Steep the leaves in water
    that has just boiled.
    Stir once, then wait."""
'''

DESIGNED = '''
"""A module about tea."""
import antigravity_that_does_not_exist

class Pot(Vessel, metaclass=ABCMeta):
    """Holds tea."""

    def __init__(self, litres: float = 1.0, *, lid=True):
        """Make a pot."""

    def _rinse(self):
        """Private."""

    @property
    def warmth(self):
        """How warm it is."""

    @warmth.setter
    def warmth(self, value):
        """Never seen: the getter came first."""

    @functools.cached_property
    def weight(self):
        """In grams."""

    @staticmethod
    @trace(level=2)
    async def pour(cup, /, *cups, **options):
        """Pour a cup."""

    class Handle:
        def grip(self):
            """Hold on."""

    class _Spout:
        def drip(self):
            """Inside a private class."""

def silent(a): pass

def outer():
    """Outer."""
    def inner():
        """Local, so not public."""

if sys.platform == "win32":
    def boil():
        pass
else:
    def boil(kettle="red"):
        """Boil water.

            kettle: an indented line
        And one that is not.
        """

try:
    import kettle
except ImportError:
    def heat():
        """Heat slowly."""
'''


def compact(text: str) -> str:
    return "".join(text.split())


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return docs.corpus(LIBRARY, questions_per_entry=2)


@pytest.fixture(scope="module")
def library() -> dict[str, list[Entry]]:
    return docs.library_entries(LIBRARY)


def test_worked_example_of_the_docstring() -> None:
    """The call, its reference text and its row stand in the module's docstring as they come out."""
    (entry,) = docs.source_entries("tea", BREW.encode())
    (row,) = [r for r in docs.question_rows([entry], 6) if r["instruction"].startswith("In one sentence")]
    reference = f"{entry.header}\n{entry.text}"
    assert reference.splitlines() == [
        "function tea.brew(leaf, minutes=3)",
        "Steep the leaves in water",
        "that has just boiled.",
        "Stir once, then wait.",
    ]
    assert compact(json.dumps(row)) in compact(docs.__doc__ or "")
    assert all(line in (docs.__doc__ or "") for line in reference.splitlines())


def test_source_entries_are_the_documented_public_parts_in_source_order() -> None:
    """Nested classes and both branches of an `if` count; private, local and undocumented names do not."""
    assert docs.source_entries("tea", DESIGNED.encode()) == [
        Entry("module", "tea", "", "A module about tea."),
        Entry("class", "tea.Pot", "(Vessel)", "Holds tea."),
        Entry("method", "tea.Pot.__init__", "(self, litres: float=1.0, *, lid=True)", "Make a pot."),
        Entry("property", "tea.Pot.warmth", "", "How warm it is."),
        Entry("property", "tea.Pot.weight", "", "In grams."),
        Entry("async method", "tea.Pot.pour", "(cup, /, *cups, **options)", "Pour a cup."),
        Entry("method", "tea.Pot.Handle.grip", "(self)", "Hold on."),
        Entry("function", "tea.outer", "()", "Outer."),
        Entry(
            "function",
            "tea.boil",
            "(kettle='red')",
            "Boil water.\n\n    kettle: an indented line\nAnd one that is not.",
        ),
        Entry("function", "tea.heat", "()", "Heat slowly."),
    ]


def test_module_sources_are_the_public_modules_of_the_library(tmp_path: Path) -> None:
    """Whatever a distributor or a user adds to the folder stays out, as do tests and private modules."""
    kept = ["json/__init__.py", "json/tool.py", "__future__.py", "abc.py"]
    others = ["json/_scanner.py", "json/tests/a.py", "unittest/test/b.py", "tkinter/__init__.py", "test/c.py"]
    strangers = [
        "site-packages/x.py",
        "sitecustomize.py",
        "_sysconfigdata_linux.py",
        "encodings/cp037.py",
        "zz.py",
    ]
    for name in kept + others + strangers:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [name for name, _ in docs.module_sources(tmp_path)] == ["__future__", "abc", "json", "json.tool"]


def test_compiled_entries_have_real_signatures_and_no_aliases() -> None:
    """`builtins` names stand alone, others carry a module; no IOError (alias), no `help` (of `site`)."""
    builtin = {entry.name: entry for entry in docs.compiled_entries("builtins")}
    assert builtin["str.join"].header == "method str.join(self, iterable, /)"
    assert builtin["KeyError"].header == "class KeyError(LookupError)"
    assert not {"IOError", "EnvironmentError", "help", "exit", "str.__add__", "_"} & builtin.keys()
    assert "math.hypot" in {entry.name for entry in docs.compiled_entries("math")}


def test_sections_split_a_topic_at_its_headings() -> None:
    topic = 'The "tea" statement\n*******************\n\nBrews.\n\n\nMilk\n====\n\nFirst or last.\n'
    assert docs.sections(topic) == [
        Entry("topic", 'The "tea" statement', "", "\nBrews.\n\n\n"),
        Entry("topic", "Milk", "", "\nFirst or last.\n"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One line\nand another. Next, e.g. This.", "One line and another. Next, e.g. This."),
        ("f(x) -> value\n\nReturn it. Or not.\n\nMore.", "Return it. Or not.\n\nMore."),
        ("Summary without a stop\n\n>>> f()\n1", "Summary without a stop"),
        ("First. The long form is equivalent to\n\n   if x:\n       y", "First."),
        ("A built-\nin thing.\n\n- a list\n- of things\n\nLost.", "A built-in thing."),
        (">>> only_a_doctest()\nTrue", ""),
        ("name    meaning\n====    =======", ""),
    ],
)
def test_prose_is_the_unwrapped_opening(text: str, expected: str) -> None:
    assert "".join(docs.prose(text)) == expected


PARAGRAPH = st.text(alphabet="ab .:!?-(\n>*é世E", max_size=80) | st.sampled_from(
    [
        "Stir the pot slowly until it is done. Then wait.",
        "For example:",
        "brew(leaf) -> cup",
        "- a\n- b",
        ">>> 1",
    ]
)


@given(st.lists(PARAGRAPH, max_size=8), st.integers(1, 700))
def test_any_quotation_is_verbatim_and_bounded(paragraphs: list[str], longest: int) -> None:
    """Whatever the text, an answer is one piece of it (whitespace aside), of a fit length, and no promise."""
    text = "\n\n".join(paragraphs)
    sentences = docs.prose(text)
    answer = docs.quote(sentences, longest)
    assert compact(answer) in compact(text)
    assert answer == "" or docs.SHORTEST_ANSWER <= len(answer) <= docs.LONGEST_ANSWER
    assert not answer.endswith(":")
    assert len(answer) <= longest or answer == sentences[0]


@pytest.mark.parametrize(
    "text",
    [
        "Helper for pickle.",
        ">>> brew('oolong', minutes=3)\n'a cup of oolong tea, steeped for three minutes'",
        "See the documentation of the module kettle for the meaning of all of these arguments.",
        "leaf      the leaves that go into the pot\nminutes   how long they stay in the water",
        "Steep the leaves. " + "and wait " * 80,
        "Steep the leaves in water for a few minutes.\n\n- then pour\n- or wait",
    ],
)
def test_no_question_about_what_has_no_prose(text: str) -> None:
    assert docs.question_rows([Entry("function", "tea.brew", "(leaf, minutes=3)", text)], 6) == []


def test_more_questions_per_entry_keep_the_former_and_copies_are_not_asked() -> None:
    """A form belongs to a name: rows for one form are among those for three; a copied text is not asked."""
    text = "Steep the leaves in water that has just boiled. Stir once and then wait for three minutes."
    entries = [Entry("function", f"tea.brew_{i}", "(leaf, minutes=3)", f"{text} Cup {i}.") for i in range(40)]
    one, three = docs.question_rows(entries, 1), docs.question_rows(entries, 3)
    assert len(one) == 40
    assert len(three) == 120
    assert all(row in three for row in one)
    assert docs.question_rows([*entries, entries[7]._replace(name="copy")], 3) == three
    assert docs.question_rows(entries[::-1], 3) == three


def test_the_answers_are_verbatim(corpus: Corpus, library: dict[str, list[Entry]]) -> None:
    """Every answer stands in the text of the thing asked about, or is its header's signature."""
    said: dict[str, str] = {}
    entries = [entry for topic in docs.language_topics().values() for entry in docs.sections(topic)]
    entries += [entry for found in library.values() for entry in found]
    for entry in entries:
        for key in {entry.name, entry.header}:
            said[key] = said.get(key, "") + compact(f"{entry.header}\n{entry.text}") + "\n"
    reference = {compact(text) for text in corpus[0].values()}
    for row in corpus[1]:
        named = re.search(r"`(.+)`", row["instruction"])
        subject = row["input"] or (named.group(1) if named else row["instruction"].split(": ", 1)[1])
        assert compact(row["output"]) in said[subject], row
    for answer in [row["output"] for row in corpus[1][::50]]:
        assert any(compact(answer) in text for text in reference), answer


def test_the_rows_are_sorted_unique_and_of_every_form(corpus: Corpus) -> None:
    rows = corpus[1]
    questions = [(row["instruction"], row["input"]) for row in rows]
    assert questions == sorted(set(questions))
    assert all(docs.SHORTEST_ANSWER <= len(row["output"]) <= docs.LONGEST_ANSWER for row in rows)
    assert {tuple(row) for row in rows} == {("instruction", "input", "output")}
    for form in docs.FORMS + docs.TOPIC_FORMS:
        shape = re.sub(r"\\{\w+\\}", ".+", re.escape(form.instruction))
        asked = sum(re.fullmatch(shape, instruction) is not None for instruction, _ in questions)
        assert asked > 20, form
    assert 0.05 < sum(bool(row["input"]) for row in rows) / len(rows) < 0.4


def test_the_sizes_are_those_of_a_small_corpus(corpus: Corpus) -> None:
    """Wide ranges: the text grows a little with every Python version."""
    texts, rows = corpus
    topics = sum(len(text.encode()) for path, text in texts.items() if path.startswith("topics/"))
    modules = sum(len(text.encode()) for path, text in texts.items() if path.startswith("modules/"))
    assert 300_000 < topics < 1_000_000
    assert 800_000 < modules < 2_000_000
    assert 3_000 < len(rows) < 8_000
    assert len({path.lower() for path in texts}) == len(texts)  # one file each where names ignore case
    assert {"topics/assignment.txt", "modules/builtins.txt", "modules/os.txt"} <= texts.keys()


def test_the_library_is_sorted_and_worth_reading(library: dict[str, list[Entry]]) -> None:
    assert list(library) == sorted(library)
    assert all(len(entry.text) >= docs.SHORTEST_TEXT for entries in library.values() for entry in entries)


def test_nothing_of_this_machine_is_in_the_corpus(corpus: Corpus) -> None:
    everything = "\n".join([*corpus[0].values(), json.dumps(corpus[1])])
    # The topics of Python 3.11.2 print an object of their author's machine: the same for all of that version.
    ours = "\n".join(
        [*(text for path, text in corpus[0].items() if not path.startswith("topics/")), json.dumps(corpus[1])]
    )
    assert not re.search(r" at 0x[0-9a-f]{6,}", ours, re.IGNORECASE)
    for private in (LIBRARY, STAGES, Path.home() / "x", Path(sys.executable)):
        assert str(private).removesuffix("x") not in everything
    assert "\r" not in everything
    assert "\0" not in everything


PROBE = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import import_python_docs as docs
from pathlib import Path
before = set(sys.modules)
corpus = docs.corpus(Path(sys.argv[2]), 2)
print(hashlib.sha256(json.dumps(corpus).encode()).hexdigest(), *sorted(set(sys.modules) - before))
"""


def test_same_bytes_for_any_hash_seed_and_nothing_is_imported(corpus: Corpus, tmp_path: Path) -> None:
    """Two other processes with other hash seeds, locale, time zone and folder give this process's bytes."""
    command = [sys.executable, "-B", "-c", PROBE, str(STAGES), str(LIBRARY)]
    settings = [
        {"PYTHONHASHSEED": "1"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "Asia/Tokyo", "COLUMNS": "20"},
    ]
    processes = [
        subprocess.Popen(command, env={**os.environ, **extra}, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for extra in settings
    ]
    expected = hashlib.sha256(json.dumps(corpus).encode()).hexdigest()
    for process in processes:
        digest, *imported = process.communicate(timeout=60)[0].split()
        assert digest == expected
        assert set(imported) <= {"pydoc_data", "pydoc_data.topics", *docs.C_MODULES}


def test_a_python_without_its_documentation_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SystemExit, match=r"has no module pydoc_data\.topics: use a full CPython"):
        docs.language_topics()
    with pytest.raises(SystemExit, match=r"holds no \.py files of the standard library: use a full CPython"):
        docs.library_entries(tmp_path)


def test_main_writes_the_corpus(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files on disk hold exactly the texts and rows that `corpus` gives for this name."""
    monkeypatch.setattr(docs, "corpus", lambda library, per_entry: {(LIBRARY, 2): corpus}[library, per_entry])
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("imports:\n  py: {questions_per_entry: 2}\n")
    docs.main("py")
    reference = Path("data/raw/py_reference")
    files = {path.relative_to(reference).as_posix(): path.read_bytes() for path in reference.rglob("*.txt")}
    assert files == {path: text.encode() for path, text in corpus[0].items()}
    lines = Path("data/raw/py_qa/questions.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == corpus[1]
    assert sorted(path.name for path in Path("data/raw").iterdir()) == ["py_qa", "py_reference"]
