"""When the data of a configuration are prepared anew, and when not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.build import build_data
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.data import Dataset
from ssmlora_dist.models import load_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "debug_tiny.json"
MESSAGES = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
RECORDS = [{"instruction": "ask " * n, "output": "say", "messages": MESSAGES} for n in range(1, 9)]
TEMPLATE = "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{tail}{{% endfor %}}<assistant>"


class Sources:
    """A directory with `rows.jsonl`, from which data are built, and what was said."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.cache = directory, directory / "cache"
        self.said: list[str] = []
        self.tokenizer = load_tokenizer("bytes")
        (directory / "hub").mkdir()
        self.file = directory / "hub" / "rows.jsonl"
        self.write(RECORDS)

    def write(self, records: list[Any]) -> None:
        self.file.write_text("".join(json.dumps(record) + "\n" for record in records))

    def build(self, train: dict[str, Any], *overrides: str, validation: Any = None) -> tuple[Any, ...]:
        settings = [f"data.train={json.dumps(train)}", f"data.validation={json.dumps(validation)}"]
        settings += [f"data.cache_dir={self.cache}", "evaluation.every_steps=null", *overrides]
        config = load_config(CONFIG, settings)
        return build_data(config, self.tokenizer, self.said.append)

    @property
    def num_prepared(self) -> int:
        return len(list(self.cache.iterdir()))


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


def test_settings_that_decide_examples_prepare_anew_and_others_do_not(sources: Sources) -> None:
    source = {"format": "instruction", "path": str(sources.file)}
    data, validation = sources.build(source)
    assert (len(data), validation) == (len(RECORDS), None)
    sources.build({**source, "shuffle_buffer_size": 3}, "run.seed=5", "data.packing=true")
    assert sources.num_prepared == 1
    data, validation = sources.build({**source, "limit": 5}, validation=source)
    assert (len(data), len(validation)) == (5, len(RECORDS))
    sources.build(source, "data.max_length=200")
    assert sources.num_prepared == 4
    assert sources.said == []


def test_a_chat_template_decides_conversations_alone(sources: Sources) -> None:
    for tail in ("!", "?"):
        sources.tokenizer.chat_template = TEMPLATE.format(tail=tail)
        sources.build({"format": "instruction", "path": str(sources.file)})
    assert sources.num_prepared == 1
    for tail in ("!", "?"):
        sources.tokenizer.chat_template = TEMPLATE.format(tail=tail)
        sources.build({"format": "chat", "path": str(sources.file)})
    assert sources.num_prepared == 3


def test_a_task_is_made_anew_by_its_seed_and_when_its_background_changes(sources: Sources) -> None:
    text = sources.directory / "background.txt"
    text.write_text("One word after another. " * 40)
    task = {"task": "passkey", "lengths": [240], "num_examples": 2, "background": str(text)}
    first, _ = sources.build({"format": "task", "task": task})
    other, _ = sources.build({"format": "task", "task": {**task, "seed": 9}})
    assert (len(first), len(other), sources.said) == (2, 2, [])
    assert first.sha256 != other.sha256
    text.write_text("Another word after one. " * 40)
    changed, _ = sources.build({"format": "task", "task": task})
    assert changed.sha256 != first.sha256
    assert sources.said == ["passkey: is not what it was when it was last prepared; it is prepared anew"]


def test_streamed_validation_is_prepared_of_as_many_records_as_are_read(sources: Sources) -> None:
    hub = {"format": "instruction", "hub": str(sources.file.parent), "split": "train", "streaming": True}
    train = {"format": "instruction", "path": str(sources.file)}
    for records, said in ((RECORDS, 0), ([*RECORDS[:3], *RECORDS[:1]], 0), (RECORDS[1:], 1)):
        sources.write(records)
        _, validation = sources.build(train, validation={**hub, "limit": 3})
        assert isinstance(validation, Dataset)
        assert len(validation) == 3
        assert len([line for line in sources.said if line.startswith(hub["hub"] + ":")]) == said
