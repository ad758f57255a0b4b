"""The one entry: every format from a file to examples, and data of which nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from ssmlora_dist.data import DatasetReport, ExampleReader
from ssmlora_dist.errors import DataError

from ..examples import read_dataset

RECORDS = {
    "instruction": {"instruction": "Say hi.", "output": "hi"},
    "chat": {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "hi"}]},
    "text": {"text": "hi"},
    "multiple_choice": {"question": "Hi?", "choices": ["no", "hi"], "label": 1},
    "long_document_qa": {"document": "Some said hi.", "question": "What?", "answer": "hi"},
}


def build(tokenizer, path, **settings):
    given = {"format": "instruction", "max_length": 256, "partition": "train", "path": path, **settings}
    return read_dataset(ExampleReader(tokenizer=tokenizer, **given))


def trained_text(tokenizer, example):
    return tokenizer.decode(example.labels[example.labels != -100], skip_special_tokens=True)


@pytest.mark.parametrize("format", RECORDS)
def test_every_format_from_jsonl_and_parquet(format, bpe_tokenizer, write_jsonl, tmp_path):
    as_jsonl = build(bpe_tokenizer, write_jsonl([RECORDS[format]] * 3), format=format)
    table = pa.Table.from_pylist([RECORDS[format]] * 3)
    parquet.write_table(table, tmp_path / "rows.parquet")
    as_parquet = build(bpe_tokenizer, str(tmp_path / "rows.parquet"), format=format)
    assert as_jsonl.report == as_parquet.report == DatasetReport(3, 3)
    assert as_jsonl[0].input_ids.tolist() == as_parquet[0].input_ids.tolist()
    assert trained_text(bpe_tokenizer, as_jsonl[0]).strip() == "hi"
    assert as_jsonl[0].labels[-1] == bpe_tokenizer.eos_token_id


def test_text_file(byte_tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("word " * 100)
    data = build(byte_tokenizer, str(tmp_path / "*.txt"), format="text", max_length=64)
    assert data.report == DatasetReport(1, 8, num_split=1, num_pieces=8)
    assert "".join(byte_tokenizer.decode(example.input_ids) for example in data.examples).startswith(
        "word " * 100
    )


def test_counts_of_every_policy(byte_tokenizer, write_jsonl):
    rows = [{"p": "short", "a": "ok"}, {"p": "x" * 99, "a": "ok"}, {"p": "none", "a": ""}]
    path = write_jsonl(rows)
    settings = {"prompt": "{p}", "answer": "{a}", "max_length": 20}
    assert build(byte_tokenizer, path, **settings).report == DatasetReport(3, 1, 1, 0, 1)
    truncated = build(byte_tokenizer, path, too_long="truncate", **settings)
    assert truncated.report == DatasetReport(3, 2, 0, 1, 1)
    assert [example.num_tokens for example in truncated.examples] == [8, 20]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 102 tokens are more than max_length 20"):
        build(byte_tokenizer, path, too_long="refuse", **settings)


def test_limit_counts_records(byte_tokenizer, write_jsonl):
    data = build(byte_tokenizer, write_jsonl([RECORDS["instruction"]] * 9), limit=4)
    assert data.report == DatasetReport(4, 4)


def test_any_record_can_come_first(byte_tokenizer, write_jsonl):
    rows = [{"p": "short", "a": "ok"}, {"p": "x" * 99, "a": "ok"}, {"p": "none", "a": ""}]
    settings = {"format": "instruction", "prompt": "{p}", "answer": "{a}", "max_length": 20, "limit": 5}
    reader = ExampleReader(
        tokenizer=byte_tokenizer, partition="train", path=write_jsonl(rows * 3), **settings
    )
    reports = [report for _, report in reader.read()]
    kept, dropped, empty = DatasetReport(1, 1), DatasetReport(1, 0, 1), DatasetReport(1, 0, 0, 0, 1)
    assert reports == [kept, dropped, empty, kept, dropped]
    for skip in range(7):
        assert [report for _, report in reader.read(skip)] == reports[skip:]


def test_nothing_to_train_on(byte_tokenizer, write_jsonl):
    path = write_jsonl([{"instruction": "Say hi.", "output": ""}] * 2)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: nothing is left of 2 rows .*: 2 without an answer; check `fields`"
    ):
        build(byte_tokenizer, path)
    long = write_jsonl([RECORDS["instruction"]])
    with pytest.raises(
        DataError, match=r"of 1 rows at max_length 8: 1 longer than max_length; raise .* 'truncate'$"
    ):
        build(byte_tokenizer, long, max_length=8)
    answers = write_jsonl([{"instruction": "Count.", "output": "one two three"}] * 3)
    with pytest.raises(
        DataError, match=r"of 3 rows .*: 3 with an answer that alone is longer .*; raise `data.max_length`$"
    ):
        build(byte_tokenizer, answers, max_length=8, too_long="truncate")


@pytest.mark.parametrize("too_long", ["drop", "truncate", "refuse"])
def test_a_text_is_split_wherever_it_stands(too_long, byte_tokenizer, write_jsonl, tmp_path):
    text = "word " * 30
    (tmp_path / "book.txt").write_text(text)
    parquet.write_table(pa.Table.from_pylist([{"text": text}]), tmp_path / "rows.parquet")
    files = [str(tmp_path / "book.txt"), write_jsonl([{"text": text}]), str(tmp_path / "rows.parquet")]
    settings = {"format": "text", "max_length": 64, "too_long": too_long}
    book, *tables = [build(byte_tokenizer, file, **settings) for file in files]
    assert book.report == DatasetReport(1, 3, num_split=1, num_pieces=3)
    for table in tables:
        assert table.report == book.report
        pairs = zip(table.examples, book.examples, strict=True)
        assert all(one.input_ids.tolist() == other.input_ids.tolist() for one, other in pairs)


def test_fields_that_nobody_reads_are_counted(byte_tokenizer, write_jsonl):
    rows = [
        {"instruction": "Say hi.", "input": "", "output": "hi", "history": [["a", "b"]], "id": 1},
        {"instruction": "Say hi.", "output": "hi", "history": [], "id": 2, "weight": None},
        {"instruction": "Say hi.", "output": "", "completion": "hello", "id": 3},
    ]
    report = build(byte_tokenizer, write_jsonl(rows)).report
    assert report.unused_fields == {"history": 1, "id": 3, "completion": 1}
    assert report.lines() == [
        "2 examples of 3 rows; left out: 1 without an answer",
        "fields not used: id, completion (in 1 of 3 records), history (in 1 of 3 records)",
    ]
    given = [{**RECORDS["instruction"], "input": "x"}]
    report = build(byte_tokenizer, write_jsonl(given), prompt="{instruction}").report
    assert report.unused_fields == {"input": 1}


@pytest.mark.parametrize("format", RECORDS)
def test_fields_that_a_format_reads_are_not_named(format, bpe_tokenizer, write_jsonl):
    path = write_jsonl([{**RECORDS[format], "extra": {"a": 1}}])
    assert build(bpe_tokenizer, path, format=format).report.unused_fields == {"extra": 1}


def test_mapped_fields_are_read(byte_tokenizer, write_jsonl):
    record = {"q": {"text": "Who?", "id": 3}, "doc": ["a", "b"], "answers": {"text": ["me"]}, "title": "T"}
    fields = {"document": "doc", "question": "q.text", "answer": "answers.text"}
    data = build(byte_tokenizer, write_jsonl([record]), format="long_document_qa", fields=fields)
    assert data.report.unused_fields == {"title": 1}


def test_a_source_must_be_named(byte_tokenizer):
    with pytest.raises(DataError, match=r"train data: .*'instruction' needs either `path` .* or `hub`"):
        build(byte_tokenizer, None)


def test_the_partition_is_the_default_split(byte_tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split, count in [("train", 3), ("validation", 2)]:
        lines = [json.dumps(RECORDS["instruction"])] * count
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(lines))
    hub = {"hub": str(tmp_path / "set")}
    assert len(build(byte_tokenizer, None, **hub)) == 3
    assert len(build(byte_tokenizer, None, partition="validation", **hub)) == 2
    assert len(build(byte_tokenizer, None, partition="validation", split="train", **hub)) == 3


def test_import_brings_no_heavy_library():
    heavy = ("datasets", "transformers", "pyarrow")
    code = f"import sys, ssmlora_dist.data; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_data_set_knows_what_ends_its_turns(bpe_tokenizer, write_jsonl):
    path = write_jsonl([RECORDS["chat"]] * 2)
    reader = ExampleReader(
        format="chat", tokenizer=bpe_tokenizer, max_length=99, partition="train", path=path
    )
    assert read_dataset(reader).closings == {"<|eos|>"}
