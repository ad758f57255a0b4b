"""A working run in a directory, and files and models beside it that are broken in one way each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ssmlora_dist.models import load_model, load_tokenizer

CONFIG_FILE = "run.json"
READ_ONLY = "read_only"
MODEL = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
RUN: dict[str, Any] = {
    "run": {"name": "run"},
    "model": {"path": "model", "tokenizer": "bytes", "compute_dtype": "float32"},
    "adapter": {"rank": 2, "alpha": 4},
    "data": {"train": {"format": "instruction", "path": "rows.jsonl"}, "max_length": 128},
    "training": {"max_steps": 1, "global_batch_size": 2, "learning_rate": 1e-2},
    "tracking": {"tracker": "none"},
}

_GOOD_ROW = {"instruction": "Say hi.", "output": "hi"}
_CHAT_ROW = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "hi"}]}
_CHOICE_ROW = {"question": "Hi?", "choices": ["no", "hi"], "label": 1}
ROWS: dict[str, list[Any]] = {
    "rows.jsonl": [_GOOD_ROW] * 4,
    "corrupt.jsonl": [_GOOD_ROW, '{"instruction": "Say hi."', _GOOD_ROW],
    "list.jsonl": [_GOOD_ROW, [1, 2]],
    "no_output.jsonl": [_GOOD_ROW, _GOOD_ROW, {"instruction": "Say hi.", "ouput": "hi"}],
    "null.jsonl": [{"instruction": "Say hi.", "output": None}],
    "no_targets.jsonl": [{"instruction": "Say nothing.", "output": ""}] * 2,
    "no_targets_among.jsonl": [_GOOD_ROW, {"instruction": "Say nothing.", "output": " "}, _GOOD_ROW],
    "long.jsonl": [_GOOD_ROW, {"instruction": "Say hi. " * 40, "output": "hi"}],
    "all_long.jsonl": [{"instruction": "Say hi. " * 40, "output": "hi"}] * 3,
    "empty.jsonl": [],
    "chat.jsonl": [_CHAT_ROW],
    "no_role.jsonl": [_CHAT_ROW, {"messages": [{"content": "Hi."}]}],
    "choices.jsonl": [_CHOICE_ROW, {**_CHOICE_ROW, "label": 2}],
    "no_label.jsonl": [{**_CHOICE_ROW, "label": "maybe"}],
    "nested.jsonl": [{"instruction": "Say hi.", "output": {"text": "hi"}}],
}


def prepare(directory: Path) -> None:
    """Fills a directory."""
    (directory / CONFIG_FILE).write_text(json.dumps(RUN))
    (directory / "broken.json").write_text('{\n  "run": {"name": "run"},\n}')
    (directory / "no_data.json").write_text(json.dumps({key: RUN[key] for key in RUN if key != "data"}))
    for name, rows in ROWS.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (directory / name).write_text("".join(line + "\n" for line in lines))
    (directory / "latin1.jsonl").write_bytes(
        '{"instruction": "Sag grün.", "output": "hi"}\n'.encode("latin-1")
    )
    (directory / "broken.parquet").write_bytes(b"PAR1 and no more")
    (directory / "rows.csv").write_text("instruction,output\nSay hi.,hi\n")
    _models(directory)
    (directory / READ_ONLY).mkdir(mode=0o555)
    (directory / "runs" / "taken").mkdir(parents=True)
    (directory / "runs" / "taken" / "metrics.jsonl").write_text("")
    (directory / "runs" / "notes").mkdir()
    (directory / "runs" / "notes" / "notes.txt").write_text("mine")


def _models(directory: Path) -> None:
    model = load_model(init="random", config=MODEL, quantization="none", compute_dtype=torch.float32)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}

    def save(name: str, tensors: dict[str, torch.Tensor] | None, **changes: Any) -> Path:
        place = directory / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(MODEL | changes))
        if tensors is not None:
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return place

    save("model", weights)
    save("another_model", {name: tensor + 0.01 for name, tensor in weights.items()})
    truncated = save("truncated", weights) / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    torch.save(weights, save("pickled", None) / "pytorch_model.bin")
    save("without_weights", None)
    save("incomplete", {name: tensor for name, tensor in weights.items() if "layers.1." not in name})
    save("of_two_models", weights, hidden_size=32)
    save("unsupported", weights, model_type="gpt2")
    save("heads", weights, num_attention_heads=3)
    (save("damaged", weights) / "config.json").write_text("{")
    (save("without_configuration", weights) / "config.json").unlink()
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory / "no_chat_template")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.save_pretrained(directory / "more_tokens")
