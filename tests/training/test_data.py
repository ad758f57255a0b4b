"""What a run knows of its data: what ends the answers that it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.models import load_tokenizer
from ssmlora_dist.training.continuation import Continuation
from ssmlora_dist.training.data import RunData
from ssmlora_dist.training.topology import Place


class Group(ProcessGroup):
    """A process alone."""

    def __init__(self) -> None:
        super().__init__(0, 1, 0, torch.device("cpu"))

    def on_main(self, action: Any) -> Any:
        return action()


def data_of(
    directory: Path, closing: str, added: list[str], format: str = "chat"
) -> tuple[RunData, list[str]]:
    """The data of a run, and what it was warned of."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}" + closing + "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = {
        "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "hi"}],
        "text": "hi",
    }
    (directory / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = RunConfig.model_validate(
        {
            "run": {"name": "run"},
            "model": {"path": "model"},
            "data": {"train": {"format": format, "path": str(directory / "rows.jsonl")}, "max_length": 99},
            "training": {"max_steps": 1, "global_batch_size": 1},
        }
    )
    warnings: list[str] = []
    data = RunData(config, tokenizer, Group(), Place(0, 1, 0, 1), Continuation(), warnings.append)
    return data, warnings


@pytest.mark.parametrize(
    ("closing", "added", "endings", "warning"),
    [
        ("<|im_end|>\n", ["<|im_end|>"], {"end_token_ids": [257, 259], "stop_texts": []}, None),
        ("<|eos|>", [], {"end_token_ids": [257], "stop_texts": []}, None),
        ("[end]\n", [], {"end_token_ids": [257], "stop_texts": ["[end]"]}, r"with '\[end\]', which is no"),
        ("\n\n", [], {"end_token_ids": [257], "stop_texts": []}, "ends turns with white space or nothing"),
        ("", [], {"end_token_ids": [257], "stop_texts": []}, "ends turns with white space or nothing"),
    ],
)
def test_what_ends_answers_is_taken_from_the_turns(
    tmp_path: Path, closing: str, added: list[str], endings: dict[str, Any], warning: str | None
) -> None:
    data, warnings = data_of(tmp_path, closing, added)
    assert data.endings == endings
    assert len(warnings) == (warning is not None)
    assert re.search(warning or "", "".join(warnings))


def test_other_formats_end_with_a_sequence(tmp_path: Path) -> None:
    data, warnings = data_of(tmp_path, "<|im_end|>", ["<|im_end|>"], format="text")
    assert not warnings
    assert data.endings == {"end_token_ids": [257], "stop_texts": []}
