"""near_duplicates: signatures estimate Jaccard, planted twins are found, others are not, and no batch shows."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import disk_rows
import near_duplicates as nd
import text_units

PARAMS = nd.Params()
# Every kind of character that is read in a way of its own.
ALPHABET = "aB1éΩﾡ２Ｚßжعह한你好𠮷ぁのー々ﾝกำ😀 \n.,-_$。、：（\u3000\u00a0\u200b\x00\ufffd"
ALONE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\uff66-\uff9f]")


def spooled(column: pa.Array | pa.ChunkedArray) -> disk_rows.Texts:
    """Return the texts of a column as the stage keeps them."""
    texts, begin = disk_rows.Texts(None), 0
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        texts.append(chunk, np.arange(len(chunk)), begin)
        begin += len(chunk)
    return texts


def find(texts: list[str | None], params: nd.Params = PARAMS) -> tuple[list[int], list[int], list[float]]:
    """Return cluster, twin and similarity of each text."""
    column = pa.array(texts, pa.string())
    signatures = nd.signatures(column, params)
    company = nd.clusters(signatures, params)
    twin, similarity = nd.near_twins(signatures, company, params, spooled(column))
    found = [np.arange(len(texts)), np.full(len(texts), -1), np.zeros(len(texts))]
    for every, mine in zip(found, (company.cluster, twin, similarity), strict=True):
        every[company.rows] = mine
    return tuple(every.tolist() for every in found)  # type: ignore[return-value]


def units(text: str) -> list[str]:
    """Return the units of a text over ALPHABET, the plain way."""
    found, word = [], ""
    for character in text:
        code = ord(character)
        folded = chr(code - 0xFEE0).lower() if 0xFF10 <= code <= 0xFF5A else character.lower()
        surrogates = [chr(0xD7C0 + (code >> 10)), chr(0xDC00 + (code & 0x3FF))] if code > 0xFFFF else []
        separates = not surrogates and not re.fullmatch(r"[^\W_]|[\u0e33]", character)
        if separates or surrogates or ALONE.fullmatch(character):
            found += [word] if word else []
            found += surrogates or ([] if separates else [folded])
            word = ""
        else:
            word += folded
    return found + ([word] if word else [])


def runs(text: str, ngram: int) -> set[tuple[str, ...]]:
    """Return the set that stands for a text."""
    found = units(text)
    return {tuple(found[i : i + ngram]) for i in range(max(len(found) - ngram + 1, min(len(found), 1)))}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / max(len(one | other), 1)


def english(count: int, rng: random.Random) -> list[str]:
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(count)]


def chinese(count: int, rng: random.Random) -> list[str]:
    return [chr(0x4E00 + int(3000 * rng.random() ** 2)) for _ in range(count)]


def join(words: list[str]) -> str:
    return ("" if ord(words[0][0]) >= 0x4E00 else " ").join(words)


Maker = Callable[[int, random.Random], list[str]]


def twin_of(words: list[str], similarity: float, make: Maker, rng: random.Random) -> list[str]:
    """Return the words with some replaced, each 5 or more from the next, so that about this similarity is left."""
    edits = round(len(words) * (1 - similarity) / (1 + similarity) / 5)
    changed, step = list(words), (len(words) - 10) // edits
    start = 5 + rng.randrange(step)
    for place in range(start, start + edits * step, step):
        changed[place] = make(1, rng)[0] + "x" if make is english else chr(0x7000 + rng.randrange(2000))
    return changed


def test_the_example() -> None:
    """The table of the module's docstring."""
    text = nd.__doc__ or ""
    rows = re.findall(r"^    (\d)    (.*?)  +(\d+) +(-?\d+) +(\d)$", text, re.MULTILINE)
    assert len(rows) == 3
    cluster, twin, similarity = find([row[1] for row in rows])
    assert [(str(c), str(t), f"{s:g}") for c, t, s in zip(cluster, twin, similarity, strict=True)] == [
        row[2:] for row in rows
    ]


@settings(deadline=None)
@given(st.text(ALPHABET, max_size=30), st.text(ALPHABET, max_size=30), st.integers(1, 4))
@example("Ab, c.", "ab C", 2)
@example("你好 ab", "你好ab", 1)
@example("", "...", 5)
def test_exact_similarity_is_that_of_the_sets(one: str, other: str, ngram: int) -> None:
    """Units, runs, short and empty documents: as by the plain way."""
    params = nd.Params(ngram=ngram)
    found = nd.jaccard(spooled(pa.array([one, other])), np.array([0]), np.array([1]), params)
    assert found[0] == pytest.approx(jaccard(runs(one, ngram), runs(other, ngram)))


@pytest.mark.parametrize("make", [english, chinese])
@pytest.mark.parametrize("length", [10, 30, 100, 600])
def test_estimates_are_right_within_their_error(make: Maker, length: int) -> None:
    """Sparse and dense signatures: no bias, and about the spread of MinHash."""
    rng = random.Random(length)
    texts, exact = [], []
    for number in range(150):
        words = make(length, rng)
        shared = length * (number % 3 + 7) // 10
        texts += [join(words), join(words[:shared] + make(length - shared, rng))]
        exact.append(jaccard(runs(texts[-2], 5), runs(texts[-1], 5)))
    signatures = nd.signatures(pa.array(texts), PARAMS)
    rows = np.arange(0, len(texts), 2)
    error = (nd.estimates(signatures, rows, rows + 1) - exact) / np.sqrt(
        np.multiply(exact, np.subtract(1, exact)) / 128
    )
    assert abs(error.mean()) < 4 * 1.5 / len(error) ** 0.5
    assert 0.6 < error.std() < 1.5


@pytest.mark.parametrize("make", [english, chinese])
def test_planted_twins_are_found_and_nothing_else(make: Maker) -> None:
    """Of 200 pairs at similarity 0.9 at least 0.98 are found, each with its twin and the right similarity."""
    rng = random.Random(9)
    documents = [make(rng.randint(300, 500), rng) for _ in range(300)]
    twins = [twin_of(words, 0.9, make, rng) for words in documents[:200]]
    far = [twin_of(words, 0.6, make, rng) for words in documents[200:]]
    texts = [join(words) for words in documents + twins + far]
    exact = [jaccard(runs(texts[i], 5), runs(texts[300 + i], 5)) for i in range(300)]
    assert all(0.88 < value < 0.92 for value in exact[:200])
    assert all(0.5 < value < 0.7 for value in exact[200:])
    cluster, twin, similarity = find(texts)
    found = [i for i in range(200) if twin[300 + i] == i]
    assert len(found) >= 0.98 * 200
    assert twin[:300] == [-1] * 300
    assert twin[500:] == [-1] * 100
    assert all(abs(similarity[300 + i] - exact[i]) < 0.13 for i in found)
    settled = [i for i in found if abs(similarity[300 + i] - exact[i]) < 1e-6]
    assert len(settled) > 20  # those whose estimate was near the threshold
    assert all(cluster[row] == (row if twin[row] < 0 else twin[row]) for row in range(len(texts)))


@pytest.mark.parametrize("make", [english, chinese])
def test_twins_little_above_the_threshold_are_found(make: Maker) -> None:
    """Of 200 pairs at similarity 0.81 to 0.85 at least 0.95 are found, though many have an estimate below 0.8."""
    rng = random.Random(5)
    texts, exact = [], []
    while len(exact) < 200:
        words = make(rng.randint(300, 500), rng)
        twin = twin_of(words, 0.83, make, rng)
        similarity = jaccard(runs(join(words), 5), runs(join(twin), 5))
        if 0.81 < similarity < 0.85:
            texts += [join(words), join(twin)]
            exact.append(similarity)
    twin = find(texts)[1]
    assert sum(twin[row + 1] == row for row in range(0, len(texts), 2)) >= 190
    rows = np.arange(0, len(texts), 2)
    estimates = nd.estimates(nd.signatures(pa.array(texts), PARAMS), rows, rows + 1)
    assert np.count_nonzero(estimates < PARAMS.threshold) > 20


@pytest.fixture(scope="module")
def mixed() -> list[str | None]:
    """Documents of all lengths and kinds, and their signatures in one batch."""
    rng = random.Random(3)
    texts: list[str | None] = [None, "", "...", "Yes", "No", "😀" * 9, "a" * 70, "你" * 50]
    for length in (1, 4, 5, 6, 40, 700):
        texts += [join(english(length, rng)), join(chinese(length, rng)), join(english(length, rng)) + "𠮷é"]
        texts.append("".join(rng.choices(ALPHABET, k=length)))
    return texts


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 32), max_size=6), large=st.booleans())
def test_no_batch_shows(mixed: list[str | None], cuts: list[int], large: bool) -> None:
    """Any cut into batches, with slices and empty ones, gives the signatures of one text at a time."""
    kind = pa.large_string() if large else pa.string()
    whole = pa.array(mixed, kind)
    edges = [0, *sorted(cuts), len(mixed)]
    batches = pa.chunked_array([whole[a:b] for a, b in itertools.pairwise(edges)], kind)
    one_by_one = [nd.signatures(pa.array([text], kind), PARAMS) for text in mixed]
    assert np.array_equal(nd.signatures(batches, PARAMS), np.concatenate(one_by_one))


def mix(number: int) -> int:
    """The finaliser of MurmurHash3."""
    number = (number ^ number >> 16) * 0x85EBCA6B % 2**32
    number = (number ^ number >> 13) * 0xC2B2AE35 % 2**32
    return number ^ number >> 16


def plain_signature(text: str | None, k: int) -> list[int]:
    """Return the signature by its definition, step by step."""

    def polynomial(values: list[int]) -> int:
        return mix(sum(value * pow(2891336453, place, 2**32) for place, value in enumerate(values)) % 2**32)

    codes = text_units._alphabet()[0].tolist()
    hashes = []
    for run in runs(text or "", 5):
        hashes.append(polynomial([polynomial([codes[ord(letter)] for letter in unit]) for unit in run]))
    slots: dict[int, int] = {}
    for number in hashes:
        slot = number * k >> 32
        slots[slot] = min(number, slots.get(slot, number))
    signature = []
    for slot in range(k):
        source = min(slots, key=lambda other: (other != slot, mix(slot * k + other + 1)), default=None)
        signature.append(65535 if source is None else slots[source] & 65535)
    return signature


@pytest.mark.parametrize("k", [64, 128, 256])
def test_signatures_follow_their_definition(mixed: list[str | None], k: int) -> None:
    signatures = nd.signatures(pa.array(mixed), nd.Params(num_perm=k))
    assert signatures.tolist() == [plain_signature(text, k) for text in mixed]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Windows of 96 bytes, so that most documents are longer."""
    text_units._powers.cache_clear()
    monkeypatch.setattr(text_units, "WINDOW", 96)
    yield
    text_units._powers.cache_clear()


def test_no_window_shows(mixed: list[str | None], request: pytest.FixtureRequest) -> None:
    """A document read window by window has the signature that it has in one, also with pairs of surrogates."""
    expected = nd.signatures(pa.array(mixed), PARAMS)
    request.getfixturevalue("narrow")
    assert np.array_equal(nd.signatures(pa.array(mixed), PARAMS), expected)


def test_first_is_kept() -> None:
    """Rows are priorities: the first of a cluster stays, all others name it."""
    rng = random.Random(1)
    words = english(200, rng)
    texts = [join(words), "Another.", join(twin_of(words, 0.95, english, rng)), join(words).upper()]
    assert find(texts)[1] == [-1, -1, 0, 0]
    assert find(texts[::-1])[1] == [-1, 0, -1, 0]


def test_ends_of_a_chain_are_kept() -> None:
    """One connected cluster: what goes is near a kept document before it, and no two that stay are near each other."""
    rng = random.Random(2)
    versions = [english(300, rng)]
    for _ in range(8):
        versions.append(twin_of(versions[-1], 0.9, english, rng))
    texts = [join(words) for words in versions]
    cluster, twin, similarity = find(texts)
    assert cluster == [0] * 9
    kept = [row for row in range(9) if twin[row] < 0]
    assert kept[0] == 0
    assert 2 <= len(kept) <= 5
    assert all(twin[row] in kept and twin[row] < row for row in range(9) if row not in kept)
    assert all((value >= 0.8) == (row not in kept) for row, value in enumerate(similarity))
    assert all(jaccard(runs(texts[a], 5), runs(texts[b], 5)) < 0.8 for a in kept for b in kept if a < b)


def test_short_and_empty_documents() -> None:
    """Shorter than a run: near the same words only. Without units: near nothing."""
    texts = ["Yes", "No", "", None, "yes.", "No, no", "...", "!!!", "是", "是。", "不是"]
    cluster, twin, similarity = find(texts)
    assert twin == [-1, -1, -1, -1, 0, -1, -1, -1, -1, 8, -1]
    assert cluster == [0, 1, 2, 3, 0, 5, 6, 7, 8, 8, 10]
    assert similarity == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_no_documents() -> None:
    for column in (pa.array([], pa.string()), pa.chunked_array([], pa.string())):
        signatures = nd.signatures(column, PARAMS)
        assert signatures.shape == (0, 128)
        company = nd.clusters(signatures, PARAMS)
        twins = nd.near_twins(signatures, company, PARAMS, spooled(column))
        assert [len(result) for result in (*company, *twins)] == [0] * 4


def test_many_identical_documents() -> None:
    assert find(["The same old song, again and again."] * 3000)[1] == [-1] + [0] * 2999


@pytest.mark.parametrize("kind", ["words", "characters", "one word", "one word again and again"])
def test_huge_documents(kind: str) -> None:
    """5 MB in one document: with a near twin, found; of one word or one run, read in bounded pieces."""
    rng = random.Random(5)
    texts = {
        "words": " ".join([f"{n:x}" for n in range(850_000)]),
        "characters": "".join(map(chr, rng.choices(range(0x4E00, 0x9FA5), k=1_700_000))),
        "one word": "ab" * 2_500_000,
        "one word again and again": "ab " * 1_700_000,
    }
    text = texts[kind]
    assert len(text.encode()) >= 5e6
    assert find([text, "short", text[:-90] + "END"])[1] == [-1, -1, -1 if kind.startswith("one") else 0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(0, 3))
def test_clusters_are_connected(picks: list[int], seed: int) -> None:
    """A cluster hangs together by pairs at the threshold, is named by its least row, and equal documents share one."""
    rng = random.Random(seed)
    words = english(60, rng)
    versions = [join(words[n:] + english(n, rng)) for n in range(0, 39, 3)]
    signatures = nd.signatures(pa.array([versions[n] for n in picks]), PARAMS)
    company = nd.clusters(signatures, PARAMS)
    cluster = np.arange(len(picks))
    cluster[company.rows] = company.cluster
    for name in np.unique(cluster):
        members = np.flatnonzero(cluster == name)
        assert members[0] == name
        reached = {int(name)}
        for _ in members:
            pairs = [(a, b) for a in reached for b in members]
            near = nd.estimates(signatures, *np.array(pairs).T) >= PARAMS.threshold - nd.doubt(PARAMS)
            reached |= {int(b) for (_, b), true in zip(pairs, near, strict=True) if true}
        assert reached == set(members.tolist())
    for pick in set(picks):
        assert len({int(c) for c, p in zip(cluster, picks, strict=True) if p == pick}) == 1


def one_band_alike(row: npt.NDArray[np.uint16], band: int, by: int) -> npt.NDArray[np.uint16]:
    """Return a signature with another value in one slot, the one numbered `by`, of each band but this one."""
    number, slots = nd.bands(PARAMS)
    places = np.arange(number) * slots + by
    changed = row.copy()
    changed[np.delete(places, band)] += 1
    return changed


def test_a_chain_of_pairs_that_share_one_band_each_is_one_cluster() -> None:
    """Two clusters meet two others in the same band."""
    row = np.arange(PARAMS.num_perm, dtype=np.uint16)
    other = one_band_alike(row, 0, 0)
    rows = np.stack([one_band_alike(row, 1, 1), one_band_alike(other, 1, 2), row, other])
    assert nd.clusters(rows, PARAMS).cluster.tolist() == [0, 0, 0, 0]


def test_who_shares_a_band_and_no_more_is_alone() -> None:
    rows = np.arange(2 * PARAMS.num_perm, dtype=np.uint16).reshape(2, -1)
    rows[1, :10] = rows[0, :10]
    assert len(nd.clusters(rows, PARAMS).rows) == 0


def test_a_signature_that_begins_like_that_of_no_text_is_one() -> None:
    rows = np.full((4, PARAMS.num_perm), nd.NO_SIGNATURE)
    rows[2:, 1:] = np.arange(1, PARAMS.num_perm)
    assert nd.clusters(rows, PARAMS).rows.tolist() == [2, 3]


def test_the_threshold_itself_is_near() -> None:
    """At 1: the same words, whatever their case and punctuation, and nothing else."""
    texts = [
        "The cat sat on the mat, and slept.",
        "the cat sat on the mat and slept",
        "The cat sat on a mat, and slept.",
    ]
    assert find(texts, nd.Params(threshold=1))[1:] == ([-1, 0, -1], [0, 1, 0])


def test_bands_find_what_the_threshold_asks() -> None:
    assert nd.bands(PARAMS) == (18, 7)
    assert nd.bands(nd.Params(threshold=1)) == (1, 128)
    for threshold in (0.3, 0.5, 0.7, 0.9, 0.95):
        number, slots = nd.bands(nd.Params(threshold=threshold))
        assert number * slots <= 128
        assert 1 - (1 - threshold**slots) ** number >= 0.98


def test_estimates_alone_need_no_texts() -> None:
    params = nd.Params(exact=False)
    signatures = nd.signatures(pa.array(["a b c d e f", "g", "A B C D E F"]), params)
    company = nd.clusters(signatures, params)
    assert company.rows.tolist() == [0, 2]
    assert nd.near_twins(signatures, company, params, disk_rows.Texts(None))[0].tolist() == [-1, 0]


@pytest.mark.parametrize(
    "wrong", [{"treshold": 0.8}, {"threshold": 0}, {"threshold": 80}, {"ngram": 0}, {"num_perm": 100}]
)
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        nd.Params(**wrong)  # type: ignore[arg-type]


def test_signatures_are_frozen(mixed: list[str | None]) -> None:
    """Another value here makes every cached signature and every dropped document another one."""
    codes, first_alone = text_units._alphabet()
    assert first_alone == 28392
    assert hashlib.sha256(codes.astype("<u2").tobytes()).hexdigest()[:16] == "9498e0fe07a265ce"
    for k, digest in {64: "6bc41399fa8e6e55", 128: "0358e62c570aa596", 256: "8d3521986648837c"}.items():
        signatures = nd.signatures(pa.array(mixed), nd.Params(num_perm=k))
        assert hashlib.sha256(signatures.astype("<u2").tobytes()).hexdigest()[:16] == digest


@given(
    st.lists(st.integers(0, 300), max_size=5),
    st.lists(st.integers(0, 299), max_size=700),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_rows_on_disk_are_rows_in_memory(cuts: list[int], wanted: list[int], begin: int, end: int) -> None:
    """However they were appended: any rows in any order, near, far and twice, and slices."""
    rows = np.arange(900, dtype=np.uint16).reshape(300, 3)
    with tempfile.TemporaryDirectory() as folder:
        on_disk = disk_rows.Rows(Path(folder), 3, np.uint16)
        for first, last in itertools.pairwise([0, *sorted(cuts), 300]):
            on_disk.append(rows[first:last])
        assert list(Path(folder).iterdir()) == []
        assert len(on_disk) == 300
        assert np.array_equal(on_disk[np.array(wanted, np.int64)], rows[np.array(wanted, np.int64)])
        assert np.array_equal(on_disk[begin:end], rows[begin:end])


@given(
    st.lists(st.lists(st.sampled_from([0, 1, 2**24 - 1, 2**24, 2**31, 2**32 - 1]), max_size=40), max_size=5),
    st.sampled_from([0, 2**16, 2**30]),
    st.sampled_from([1, 30, 2**16]),
)
def test_buckets_bring_equal_ones_together(batches: list[list[int]], expected: int, together: int) -> None:
    """Each number lies in one bucket, with all its rows in the order in which they came; nothing is lost."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_rows, "ROWS", together)
        buckets = disk_rows.Buckets(Path(folder), 2, expected)
        count = 0
        for numbers in batches:
            buckets.append(np.array([[n, count + i] for i, n in enumerate(numbers)], np.uint32).reshape(-1, 2))
            count += len(numbers)
        dealt = [bucket.tolist() for bucket in buckets]
    assert sorted(row for bucket in dealt for _, row in bucket) == list(range(count))
    assert all(bucket == sorted(bucket, key=lambda pair: pair[1]) for bucket in dealt)
    for one, other in itertools.combinations(dealt, 2):
        assert not {number for number, _ in one} & {number for number, _ in other}
    if expected == 2**30:
        assert len(dealt) == len({n >> 26 for numbers in batches for n in numbers})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_on_disk_are_texts_in_memory(mixed: list[str | None], kind: pa.DataType, tmp_path: Path) -> None:
    """Some texts of each slice of a column, null as an empty one."""
    column = pa.array(["before", *mixed], kind)[1:]
    texts = disk_rows.Texts(tmp_path)
    kept = np.array([row for row in range(len(mixed)) if row % 3])
    for begin, end in itertools.pairwise([0, 0, 7, 20, 20, len(mixed)]):
        texts.append(column[begin:end], kept[(kept >= begin) & (kept < end)] - begin, begin)
    for rows in (kept, kept[3:9], kept[:0]):
        expected = [mixed[row] or "" for row in rows.tolist()]
        assert texts.take(rows).to_pylist() == expected
        assert texts.sizes(rows).tolist() == [len(text.encode()) for text in expected]


@pytest.mark.parametrize("make", [english, chinese])
def test_on_disk_and_in_memory_are_one(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters and twins from files, in blocks of 7, are those from arrays."""
    rng = random.Random(4)
    documents = [make(rng.randint(5, 200), rng) for _ in range(100)]
    twins = [twin_of(words, 0.85, make, rng) for words in documents if len(words) > 80]
    texts = [join(words) for words in [*documents, *twins]]
    column = pa.array([*texts, "", None, *texts[:5]])
    memory = nd.signatures(column, PARAMS)
    company = nd.clusters(memory, PARAMS)
    twin, similarity = nd.near_twins(memory, company, PARAMS, spooled(column))
    assert (twin >= 0).sum() > 20
    monkeypatch.setattr(nd, "BLOCK", 7)
    monkeypatch.setattr(disk_rows, "ROWS", 40)
    disk, texts_there = disk_rows.Rows(tmp_path, 128, np.uint16), disk_rows.Texts(tmp_path)
    disk.append(memory)
    texts_there.append(column, company.rows, 0)
    assert all(map(np.array_equal, nd.clusters(disk, PARAMS, tmp_path), company))
    found = nd.near_twins(disk, company, PARAMS, texts_there)
    assert np.array_equal(found[0], twin)
    assert np.array_equal(found[1], similarity)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=30), st.integers(0, 3), st.randoms(use_true_random=False))
def test_clusters_follow_from_content(picks: list[int], seed: int, shuffle: random.Random) -> None:
    """The same documents in another order make the same clusters."""
    words = english(60, random.Random(seed))
    chain = [join(words[n : n + 40]) for n in range(13)]
    found = []
    for order in (picks, shuffle.sample(picks, len(picks))):
        cluster = find([chain[n] for n in order])[0]
        found.append({frozenset(n for n, c in zip(order, cluster, strict=True) if c == name) for name in cluster})
    assert found[0] == found[1]


@given(st.text(ALPHABET, max_size=40))
def test_spans_are_the_units(text: str) -> None:
    """As many as by the plain way, in order; each span folds to its unit, and equal units have equal bytes."""
    names, places = text_units.spans(text)
    expected = units(text)
    assert len(names) == len(places) == len(expected)
    assert len({*zip(names, expected, strict=True)}) == len({*names})
    assert all(a < b <= c for (a, b), (c, _) in itertools.pairwise([*places, (10**6, 0)]))
    (_, hashes, counts) = next(text_units.pieces(pa.array([text])))
    assert len(hashes) == counts[0] == len(expected)
    assert len({*zip(hashes.tolist(), names, strict=True)}) == len({*names})
