"""Reading records, and everything that can be wrong with files and hub names."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from datasets.packaged_modules.cache.cache import Cache
from pyarrow import parquet

from ssmlora_dist.data.sources import read_records, resolve_revision
from ssmlora_dist.errors import DataError


def read(**arguments):
    return [(record.values, record.where) for record in read_records(**arguments)]


def test_jsonl_with_blank_lines_and_byte_order_mark(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n\n  \n{"a": 2}')
    assert read(path=str(file)) == [({"a": "é"}, f"{file}:1"), ({"a": 2}, f"{file}:4")]


def test_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"q": ["x", "y"], "spans": [[{"s": 1}], []]}), file)
    expected = [
        ({"q": "x", "spans": [{"s": 1}]}, f"{file}: row 1"),
        ({"q": "y", "spans": []}, f"{file}: row 2"),
    ]
    assert read(path=str(file)) == expected


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("Line one.\n\nLine two.\n")
    (record,) = read_records(path=str(file))
    assert record.values == {"text": "Line one.\n\nLine two.\n"}


def test_globs_lists_and_limit(tmp_path):
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"n": "{name}1"}}\n{{"n": "{name}2"}}\n')
    in_glob = [values["n"] for values, _ in read(path=str(tmp_path / "?.jsonl"))]
    assert in_glob == ["a1", "a2", "b1", "b2"]
    listed = read(path=[str(tmp_path / "c[1].jsonl"), str(tmp_path / "a*.jsonl")], limit=3)
    assert [values["n"] for values, _ in listed] == ["c[1]1", "c[1]2", "a1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: is not valid JSON"),
        (b'{"a": 1}\n\n[1, 2]\n', r"rows\.jsonl:3: holds a list, but each line must be a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"rows\.jsonl:2: is not valid UTF-8"),
        (b'{"a": "\\ud83d"}\n', r"rows\.jsonl:1: is not valid UTF-8 \(U\+D83D .* remove what is damaged"),
        (b'{"a": 1, "b": 2, "a": 3}', r"rows\.jsonl:1: has the field 'a' more than once; rename or remove"),
        (b'{"a": [{"b": 1, "b": 1}]}', r"rows\.jsonl:1: has the field 'b' more than once"),
        (b"[" * 100_000, r"rows\.jsonl:1: is not valid JSON"),
        (b'[{"a": 1}, {"a": 2}]', r"rows\.jsonl:1: begins as one JSON document, .* JSON object on each line"),
        (b'\xef\xbb\xbf[\n  {"a": 1}\n]', r"rows\.jsonl:1: begins as one JSON document"),
        (b'\n [ \n{"a": 1},\n{"a": 2}]', r"rows\.jsonl:2: begins as one JSON document"),
        (b'{\n  "a": 1\n}\n', r"rows\.jsonl:1: begins as one JSON document"),
        (b"[]", r"rows\.jsonl:1: begins as one JSON document"),
        (b'{"a": 1}\n[{"a": 1}]', r"rows\.jsonl:2: holds a list"),
        (b"\n \n", r"rows\.jsonl: holds no records"),
        (b"", r"rows\.jsonl: holds no records"),
    ],
)
def test_broken_jsonl(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path=str(tmp_path / "rows.jsonl"))


def test_numbers_that_are_not_finite_are_missing(tmp_path, monkeypatch):
    lines = [
        '{"a": NaN, "b": [1.5, -Infinity], "c": {"d": 1e400, "e": 3.0}, "f": "NaN", "g": ' + "9" * 400 + "}"
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    expected = {"a": None, "b": [1.5, None], "c": {"d": None, "e": 3.0}, "f": "NaN", "g": int("9" * 400)}
    assert read(path=str(tmp_path / "rows.jsonl"))[0][0] == expected
    nan, inf = float("nan"), float("inf")
    row = {"a": nan, "b": [1.5, inf], "c": {"d": -inf, "e": 3.0}, "f": "NaN"}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    del expected["g"]
    assert read(path=str(tmp_path / "rows.parquet"))[0][0] == expected
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [row])
    assert read(hub="some/set")[0][0] == expected
    pairs = pa.array([[("k", nan)]], pa.map_(pa.string(), pa.float64()))
    parquet.write_table(pa.table({"a": pairs}), tmp_path / "pairs.parquet")
    assert read(path=str(tmp_path / "pairs.parquet"))[0][0] == {"a": [["k", None]]}


def test_a_whole_surrogate_pair_is_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(r'{"a": "\ud83d\ude00"}')
    assert read(path=str(tmp_path / "rows.jsonl"))[0][0] == {"a": "😀"}


def test_other_broken_files(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but not really")
    latin = pa.array([b"na\xefve"])
    latin = pa.StringArray.from_buffers(1, *latin.buffers()[1:])
    parquet.write_table(pa.table({"a": latin}), tmp_path / "latin.parquet")
    parquet.write_table(pa.table({"a": list(range(1000))}), tmp_path / "damaged.parquet")
    content = (tmp_path / "damaged.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    (tmp_path / "rows.csv").write_text("a,b\n")
    for name, message in [
        ("rows.parquet", r"rows\.parquet: is not a readable Parquet file"),
        ("latin.parquet", r"latin\.parquet: is not a readable Parquet file \('utf-8' codec can't decode"),
        ("damaged.parquet", r"damaged\.parquet: is not a readable Parquet file"),
        ("twice.parquet", r"twice\.parquet: has the field 'a' more than once; rename or remove all but one"),
        ("empty.txt", r"empty\.txt: holds no records"),
        ("latin.txt", r"latin\.txt:2: is not valid UTF-8"),
        ("rows.csv", r"rows\.csv: unknown kind of file.*\.jsonl, \.parquet, \.txt"),
        ("row.csv", r"row\.csv: no such file \(nearest: rows\.csv\)"),
        ("*.jsonl", r"\*\.jsonl: no such file"),
        ("nowhere/rows.jsonl", r"nowhere/rows\.jsonl: no such file"),
        (".", r"is a directory; name its files"),
    ]:
        with pytest.raises(DataError, match=message):
            read(path=str(tmp_path / name))


def test_all_files_are_found_before_any_is_read(tmp_path):
    (tmp_path / "broken.jsonl").write_text("not JSON")
    with pytest.raises(DataError, match="no such file"):
        read(path=[str(tmp_path / "broken.jsonl"), str(tmp_path / "missing.jsonl")])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set that `datasets` takes by name: a directory with two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, count in [("train", 3), ("validation", 1)]:
        rows = [json.dumps({"q": f"{split} {i}"}) for i in range(count)]
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(rows))
    return str(tmp_path / "set")


def test_hub(hub):
    assert read(hub=hub, split="validation") == [({"q": "validation 0"}, f"{hub}, split validation: row 1")]
    assert [values["q"] for values, _ in read(hub=hub, split="train[1:]", limit=1)] == ["train 1"]


def test_streamed_hub(hub):
    rows = read(hub=hub, split="train")
    assert read(hub=hub, split="train", streaming=True) == rows
    assert read(hub=hub, split="train", streaming=True, limit=2) == rows[:2]


ONE, TWO = "1" * 40, "2" * 40


def builds(monkeypatch, commits, cached=None):
    """The library, with commits by revision; out of reach it gives what is in its cache."""
    kind = Cache if cached else datasets.DatasetBuilder

    def build(hub, subset, revision):
        if not cached and revision not in commits:
            raise datasets.exceptions.DatasetNotFoundError(f"Revision '{revision}' doesn't exist for dataset")
        builder = object.__new__(kind)
        builder.hash = cached or commits[revision]
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", build)
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda hub, file, repo_type, revision: f"snapshots/{commits.get(revision)}/README.md",
    )


def test_what_a_revision_stands_for(monkeypatch):
    builds(monkeypatch, {None: ONE, "v1": TWO, TWO: TWO})
    resolved = [resolve_revision("some/set", None, revision) for revision in (None, "v1", TWO)]
    assert resolved == [ONE, TWO, TWO]
    with pytest.raises(DataError, match=r"Revision 'v2' doesn't exist.*; name a branch, tag or commit"):
        resolve_revision("some/set", None, "v2")


def test_without_a_connection_the_cache_must_be_of_the_revision(monkeypatch):
    """The library gives whatever it has."""
    builds(monkeypatch, {"v1": ONE}, cached=ONE)
    assert [resolve_revision("some/set", None, revision) for revision in (None, "v1", ONE)] == [ONE] * 3
    for revision in ("v2", TWO):
        with pytest.raises(DataError, match=rf"newest copy in the cache is of commit {ONE}, not known"):
            resolve_revision("some/set", None, revision)


def test_a_directory_has_no_revision(hub):
    assert resolve_revision(hub, None, None) is None
    with pytest.raises(DataError, match="is no data set on the hub, so it has no revision 'v1'"):
        resolve_revision(hub, None, "v1")


def test_a_stream_that_breaks_off(hub):
    with Path(hub, "train.jsonl").open("a") as file:
        file.write("\n{broken\n")
    rows = read_records(hub=hub, split="train", streaming=True)
    with pytest.raises(DataError, match=r"set, split train: the row after \d+ cannot be read \(.*`path`"):
        list(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tain"}, r"Unknown split \"tain\". Should be one of \['train', 'validation'\]; check"),
        (
            {"split": "train", "subset": "hard"},
            r"\(hard\): BuilderConfig 'hard' not found. Available: \['default'\]",
        ),
        (
            {"split": "train[3:]"},
            r"Instruction \"train\[3:\]\" corresponds to no data; check `subset` and `split`",
        ),
    ],
)
def test_wrong_split_or_subset(hub, arguments, message):
    with pytest.raises(DataError, match=message):
        read(hub=hub, **arguments)


def test_empty_split(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [])
    with pytest.raises(DataError, match=r"some/set: split 'test' holds no records"):
        read(hub="some/set", split="test")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'some/set' on the Hub"),
            r"some/set: cannot be loaded \(ConnectionError: Could",
        ),
        (datasets.exceptions.DatasetNotFoundError("gone"), r"some/set: no such data set on the hub"),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            r"some/set: cannot be loaded.*scripts.*`path`",
        ),
    ],
)
def test_hub_out_of_reach(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=message):
        read(hub="some/set")
