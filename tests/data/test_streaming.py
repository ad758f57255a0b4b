"""Streams: every record once in a pass, the same row from any position, and what is wrong with a source."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

import pytest

from ssmlora_dist.data import BatchShape, DatasetReport, ExampleReader, ExampleStream, StreamedBatches
from ssmlora_dist.errors import DataError

PAD = 0
NUM_RECORDS = 23


def here(action):
    """One rank, the main one."""
    return action()


@pytest.fixture
def path(write_jsonl):
    """Records whose answers are their numbers; every seventh is too long."""
    records = [{"p": "x" * (99 if i % 7 == 6 else 1), "a": f"{i:03}"} for i in range(NUM_RECORDS)]
    return write_jsonl(records)


KEPT = [i for i in range(NUM_RECORDS) if i % 7 != 6]


def stream(tokenizer, path, block_size=5, seed=0, **settings):
    given = {"format": "instruction", "prompt": "{p}", "answer": "{a}", "max_length": 20, "path": path}
    reader = ExampleReader(tokenizer=tokenizer, partition="train", **{**given, **settings})
    return ExampleStream(reader, block_size, seed)


def batches(source, size=4, micro=1, rank=0, ranks=1, **begin):
    return StreamedBatches(source, BatchShape(size, micro, rank, ranks, PAD), here, **begin)


def targets_of(batch):
    """By row."""
    rows = batch.places // batch.shape[1]
    return [batch.targets[rows == row] for row in range(batch.shape[0])]


def shown(tokenizer, micro_batches):
    """The numbers of the records in the order of training."""
    return [
        int(tokenizer.decode(targets, skip_special_tokens=True))
        for batch in micro_batches
        for targets in targets_of(batch)
    ]


def row_of(tokenizer, loader, steps):
    return [number for step in steps for number in shown(tokenizer, loader.micro_batches(step))]


@pytest.mark.parametrize("block_size", [1, 5, 1000])
def test_every_pass_shows_every_example_once(byte_tokenizer, path, block_size):
    loader = batches(stream(byte_tokenizer, path, block_size))
    row = row_of(byte_tokenizer, loader, range(15))
    loader.close()
    passes = [row[k * len(KEPT) : (k + 1) * len(KEPT)] for k in range(3)]
    assert all(sorted(one) == KEPT for one in passes)
    # Unshuffled, the passes are alike and in order; shuffled, none is.
    assert (passes[0] == KEPT) == (block_size == 1)
    assert len({tuple(one) for one in passes}) == (1 if block_size == 1 else 3)


def test_shuffled_within_blocks_only(byte_tokenizer, path):
    loader = batches(stream(byte_tokenizer, path, block_size=5))
    row = row_of(byte_tokenizer, loader, range(5))
    loader.close()
    assert sorted(row[:5]) == KEPT[:5]
    assert row[:5] != KEPT[:5]
    assert sorted(row[5:10]) == KEPT[5:10]


@pytest.mark.parametrize("block_size", [1, 5, 1000])
def test_it_goes_on_from_any_step_as_if_it_had_not_stopped(byte_tokenizer, path, block_size):
    straight = batches(stream(byte_tokenizer, path, block_size))
    row, positions, reports = [], [], []
    for step in range(14):
        positions.append(json.loads(json.dumps(straight.position(step))))
        reports.append(straight.report)
        row += row_of(byte_tokenizer, straight, [step])
    last = straight.report
    straight.close()
    for step in range(14):
        again = batches(stream(byte_tokenizer, path, block_size), first_step=step, start=positions[step])
        assert again.position(step) == positions[step]
        assert row_of(byte_tokenizer, again, range(step, 14)) == row[4 * step :], f"from step {step}"
        assert again.report == last
        again.close()


def test_a_step_that_did_not_come_to_its_end_is_taken_again(byte_tokenizer, path):
    loader = batches(stream(byte_tokenizer, path))
    row_of(byte_tokenizer, loader, range(3))
    before, after = loader.position(2), loader.position(3)
    loader.close()
    assert before != after
    again = batches(stream(byte_tokenizer, path), first_step=2, start=before)
    straight = batches(stream(byte_tokenizer, path))
    assert row_of(byte_tokenizer, again, [2]) == row_of(byte_tokenizer, straight, range(3))[8:]
    again.close()
    straight.close()


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_the_same_global_batches_on_any_topology(byte_tokenizer, path, ranks, micro):
    """Only rank 0 reads: the others get what it has read."""
    handed = []

    def on_main(action):
        handed.append(action())
        return handed[-1]

    main = StreamedBatches(stream(byte_tokenizer, path), BatchShape(4, micro, 0, ranks, PAD), on_main)
    missing = stream(byte_tokenizer, "missing.jsonl")
    others = [
        StreamedBatches(missing, BatchShape(4, micro, rank, ranks, PAD), lambda action: handed[-1])
        for rank in range(1, ranks)
    ]
    alone = batches(stream(byte_tokenizer, path))
    for step in range(8):
        shares = [loader.micro_batches(step) for loader in (main, *others)]
        assert [n for share in shares for n in shown(byte_tokenizer, share)] == row_of(
            byte_tokenizer, alone, [step]
        )
        assert all(batch.shape[0] == micro for share in shares for batch in share)
    main.close()
    alone.close()


def test_a_document_may_fill_more_than_a_block(byte_tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"{i:07} " for i in range(100)))
    source = stream(
        byte_tokenizer,
        str(tmp_path / "book.txt"),
        format="text",
        prompt=None,
        answer=None,
        max_length=8,
    )
    loader = batches(source, size=10)
    texts = Counter(
        byte_tokenizer.decode(row, skip_special_tokens=True)
        for step in range(10)
        for batch in loader.micro_batches(step)
        for row in batch.inputs["input_ids"]
    )
    loader.close()
    assert sum(texts.values()) == 100
    assert max(texts.values()) == 1


def test_no_more_is_read_than_a_block_ahead(byte_tokenizer, path):
    source = stream(byte_tokenizer, path, block_size=3)
    read = []
    whole = source._reader.read

    def counted(*arguments):
        for item in whole(*arguments):
            read.append(item)
            yield item

    source._reader.read = counted
    loader = batches(source, size=2)
    loader.micro_batches(0)
    loader._next_block.result()
    assert len(read) == 6
    loader.close()


def test_closing_ends_the_thread(byte_tokenizer, path):
    source = stream(byte_tokenizer, path, block_size=3)
    whole, is_reading, num_read = source._reader.read, threading.Event(), 0

    def endless(*arguments):
        nonlocal num_read
        for num_read, item in enumerate(whole(*arguments)):
            # Two blocks, and then records that come as slowly as they like.
            if num_read >= 5:
                is_reading.set()
                time.sleep(0.01)
            yield ([], item[1]) if num_read >= 5 else item

    source._reader.read = endless
    loader = batches(source, size=3)
    loader.micro_batches(0)
    assert is_reading.wait(timeout=10)
    loader.close()
    assert num_read < NUM_RECORDS - 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_counts_grow_with_the_passes(byte_tokenizer, path):
    loader = batches(stream(byte_tokenizer, path, block_size=1000), size=len(KEPT))
    for step in range(3):
        loader.micro_batches(step)
        rows, kept = (step + 1) * NUM_RECORDS, (step + 1) * len(KEPT)
        assert loader.report == DatasetReport(rows, kept, rows - kept)
    loader.close()


def test_the_order_is_frozen(byte_tokenizer, path):
    """Written down so that a change of library or code that would break resuming is seen."""
    loader = batches(stream(byte_tokenizer, path, block_size=8, seed=3))
    assert row_of(byte_tokenizer, loader, range(4)) == [1, 0, 2, 8, 5, 3, 7, 4, 16, 10, 12, 14, 11, 9, 15, 17]
    loader.close()


def test_a_bad_record_shows_when_its_block_is_needed(byte_tokenizer, write_jsonl):
    records = [{"p": "x", "a": f"{i:03}"} for i in range(10)]
    path = write_jsonl([*records, "{broken", *records])
    loader = batches(stream(byte_tokenizer, path, block_size=4), size=4)
    assert sorted(row_of(byte_tokenizer, loader, range(2))) == list(range(8))
    position = loader.position(2)
    with pytest.raises(DataError, match=r"rows\.jsonl:11: is not valid JSON"):
        loader.micro_batches(2)
    assert loader.position(2) == position
    loader.close()
    write_jsonl([*records, *records])
    mended = batches(stream(byte_tokenizer, path, block_size=4), first_step=2, start=position)
    assert sorted(row_of(byte_tokenizer, mended, [2])) == [0, 1, 8, 9]
    mended.close()


def test_a_source_of_which_nothing_is_left(byte_tokenizer, write_jsonl):
    path = write_jsonl([{"p": "x" * 99, "a": "1"}] * 3)
    with pytest.raises(DataError, match="nothing is left of 3 rows at max_length 20: 3 longer"):
        stream(byte_tokenizer, path).sample()


@pytest.mark.parametrize("num_left", [0, 3, 12])
def test_a_source_that_has_become_shorter(byte_tokenizer, path, num_left):
    loader = batches(stream(byte_tokenizer, path, block_size=10))
    row_of(byte_tokenizer, loader, range(4))
    position = loader.position(4)
    loader.close()
    assert position["num_records"] + position["offset"] > 12
    with open(path) as file:
        lines = file.readlines()
    with open(path, "w") as file:
        file.writelines(lines[: max(1, num_left)])
    again = batches(stream(byte_tokenizer, path, block_size=10), first_step=4, start=position)
    with pytest.raises(
        DataError,
        match=rf"trained on \d+ records, and there are {max(1, num_left)}: the data are not those",
    ):
        again.micro_batches(4)
    again.close()


@pytest.mark.parametrize("step", [1, 4, 7])
def test_another_record_among_those_trained_on(byte_tokenizer, path, step):
    """In the block that training stands in, in one before it, and in the rest of the pass before."""
    loader = batches(stream(byte_tokenizer, path, block_size=10))
    row_of(byte_tokenizer, loader, range(step))
    position = json.loads(json.dumps(loader.position(step)))
    loader.close()
    changed = 20 if position["epoch"] else 8
    with open(path) as file:
        lines = file.readlines()
    lines[changed] = lines[changed].replace("0", "1", 1)
    with open(path, "w") as file:
        file.writelines(lines)
    again = batches(stream(byte_tokenizer, path, block_size=10), first_step=step, start=position)
    with pytest.raises(
        DataError, match=r"other records among the first \d+ than when it was trained on them"
    ):
        row_of(byte_tokenizer, again, range(step, step + 6))
    again.close()


def test_records_to_come_may_be_mended_and_added(byte_tokenizer, path):
    loader = batches(stream(byte_tokenizer, path, block_size=5))
    row_of(byte_tokenizer, loader, range(2))
    position = loader.position(2)
    loader.close()
    with open(path, "a") as file:
        file.write('{"p": "x", "a": "999"}\n')
    again = batches(stream(byte_tokenizer, path, block_size=5), first_step=2, start=position)
    assert 999 in row_of(byte_tokenizer, again, range(2, 6))
    again.close()


def test_the_sample_is_the_first_block(byte_tokenizer, path):
    sample = stream(byte_tokenizer, path, block_size=9).sample()
    assert sample.report == DatasetReport(10, 9, 1)
    assert len(sample) == 9
