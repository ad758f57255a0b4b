"""Where answers end, and how they are chosen: `launch/generate.py` and what loads adapters for it."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config import build
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.models import load_model, load_tokenizer
from ssmlora_dist.prose import split_of
from tests.tiny import randomize_adapters, tiny_model

from .processes import GENERATE_SCRIPT

BOS, EOS, PAD = 256, 257, 258
END_OF_TURN = 259
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ANSWER = [*b"good day", END_OF_TURN, *b"more", EOS, *b"x" * 99]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model of bytes whose turns end otherwise than its texts, and which begins every text."""
    directory = tmp_path / "base"
    tiny_model(num_layers=2, vocab_size=260, max_position_embeddings=256).save_pretrained(directory)
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    tokenizer.save_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory)("a")["input_ids"] == [BOS, 97]
    return directory


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Callable[..., str]:
    def write(generation: dict[str, Any] | None = None, **endings: Any) -> str:
        (base / "generation_config.json").write_text(json.dumps(generation or {}))
        model = load_model(str(base), quantization="none", compute_dtype=torch.float32)
        config = AdapterConfig(rank=2)
        add_adapters(model, config)
        randomize_adapters(model)
        tensors = {name: p.detach() for name, p in adapter_parameters(model).items()}
        settings = {"path": str(base), "quantization": "none", "compute_dtype": "float32", **endings}
        write_adapter(tmp_path / "adapter", config, tensors, base=settings)
        return str(tmp_path / "adapter")

    return write


@pytest.fixture
def generated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run_command(runpy.run_path(str(GENERATE_SCRIPT))["main"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Has models answer ANSWER, whatever they are asked; what they are asked."""
    asked: list[list[int]] = []
    load = build.load_trained

    def load_scripted(*arguments: Any, **settings: Any) -> Any:
        model, tokenizer = load(*arguments, **settings)
        steps: list[int] = []

        def embed(_: Any, ids: Any) -> None:
            if ids[0].shape[1] > 1:
                asked.append(ids[0][0].tolist())
                steps.clear()

        def head(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
            steps.append(1)
            token = torch.tensor([ANSWER[len(steps) - 1]])
            return 9.0 * torch.nn.functional.one_hot(token, 260).float()[:, None]

        model.model.embed_tokens.register_forward_pre_hook(embed)
        model.lm_head.register_forward_hook(head)
        return model, tokenizer

    monkeypatch.setattr(build, "load_trained", load_scripted)
    return asked


@pytest.mark.parametrize(
    ("generation", "endings", "answer"),
    [
        ({"eos_token_id": [EOS, END_OF_TURN]}, {}, "good day"),
        ({"eos_token_id": END_OF_TURN}, {}, "good day"),
        ({"eos_token_id": EOS}, {"end_token_ids": [END_OF_TURN], "stop_texts": []}, "good day"),
        ({}, {"end_token_ids": [EOS], "stop_texts": ["od"]}, "good"),
        ({"eos_token_id": BOS}, {}, "good daymore"),
    ],
)
@pytest.mark.usefixtures("prompts")
def test_an_answer_ends_at_every_token_that_ends_it(
    adapter: Any, generated: Any, generation: dict[str, Any], endings: dict[str, Any], answer: str
) -> None:
    code, out, err = generated("--adapter", adapter(generation, **endings), "--prompt", "hello")
    assert (code, out, err) == (0, f"{answer}\n", "")


def test_a_conversation_asks_as_training_does(adapter: Any, generated: Any, prompts: list[list[int]]) -> None:
    directory = adapter({}, end_token_ids=[END_OF_TURN])
    code, out, _ = generated("--adapter", directory, "--chat", stdin="é\nbye\n\n".encode())
    assert (code, out.count("good day")) == (0, 2)
    tokenizer = load_tokenizer(json.loads(Path(directory, "ssmlora.json").read_text())["base"]["path"])
    talk = [{"role": "user", "content": "é"}]
    assert prompts[0] == tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    talk += [{"role": "assistant", "content": "good day"}, {"role": "user", "content": "bye"}]
    assert prompts[1] == tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("prompt", ["hello", "<|bos|>hello"])
def test_a_prompt_begins_once(adapter: Any, generated: Any, prompts: list[list[int]], prompt: str) -> None:
    directory = adapter()
    assert generated("--adapter", directory, "--prompt", prompt)[0] == 0
    assert generated("--adapter", directory, stdin=prompt.encode())[0] == 0
    assert prompts == [[BOS, *b"hello"]] * 2


def test_a_task_s_question_is_one_of_its_test_split(
    adapter: Any, generated: Any, prompts: list[list[int]]
) -> None:
    code, out, err = generated(
        "--adapter", adapter(), "--task", "passkey", "--length", "240", "--max-new-tokens", "16"
    )
    assert (code, "good day" in out) == (0, True), err
    # Of 240 tokens 16 are the answer's, and the first is the beginning of the sequence.
    text = bytes(prompts[0][1:]).decode()
    assert 0.9 * 224 < len(prompts[0]) <= 224
    value = re.search(r"The pass key is (\d{5})\.", text)[1]  # type: ignore[index]
    assert f"the true answer is {value}" in out
    assert split_of(value) == "test"


def test_greedy_is_greedy_whatever_the_model_comes_with(adapter: Any, generated: Any) -> None:
    arguments = ("--prompt", "hello", "--max-new-tokens", "24")
    plain = generated("--adapter", adapter({}), *arguments)
    settings = {"repetition_penalty": 9.0, "num_beams": 3, "do_sample": True, "temperature": 9.0}
    assert generated("--adapter", adapter(settings), *arguments) == plain
    assert generated("--adapter", adapter({"suppress_tokens": [*range(256)]}), *arguments) == plain
    assert plain[0] == 0


def test_tokens_are_drawn_on_request(adapter: Any, generated: Any) -> None:
    directory = adapter()

    def answer(*options: str) -> str:
        code, out, _ = generated(
            "--adapter", directory, "--prompt", "hello", "--max-new-tokens", "24", *options
        )
        assert code == 0
        return str(out)

    drawn = answer("--temperature", "2", "--seed", "1")
    assert drawn == answer("--temperature", "2", "--seed", "1")
    assert drawn != answer("--temperature", "2", "--seed", "2")
    assert answer("--top-p", "1e-9", "--seed", "1") == answer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "0"), "--temperature 0.0: allowed: above 0"),
        (("--temperature", "nan"), "--temperature nan: allowed: above 0"),
        (("--top-p", "1.5"), "--top-p 1.5: allowed: above 0 and at most 1"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0: allowed: 1 or more"),
        (("--seed", "3"), "--seed 3: nothing is drawn without --temperature or --top-p"),
        (("--temperature", "1", "--seed", "-3"), "--seed -3: allowed: 0 or more"),
        (("--task", "paskey"), "--task paskey: no task that is generated (nearest: passkey); choose one of"),
        (("--task", "boolq"), "--task boolq: no task that is generated"),
        (("--task", "passkey", "--length", "9"), "--length 9: too short for a question; allowed: 64 or more"),
        (("--length", "512"), "--length 512: is that of a task's question; give --task too"),
        (("--prompt", "caf\udce9"), "--prompt: is not valid UTF-8 (U+DCE9 at character 4); convert it"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_read(
    generated: Any, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = generated("--adapter", "nowhere", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_input_that_is_no_utf_8_is_refused(adapter: Any, generated: Any) -> None:
    directory = adapter()
    for chat in ((), ("--chat",)):
        code, _, err = generated("--adapter", directory, *chat, stdin="caf\u00e9\n".encode("latin-1"))
        assert code == 2
        assert err.startswith("error: standard input: is not valid UTF-8 (byte 4 is 0xe9); convert it")


def test_a_template_that_fails_is_named(adapter: Any, base: Path, generated: Any) -> None:
    directory = adapter()
    (base / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    code, _, err = generated("--adapter", directory, "--chat", stdin=b"hello\n")
    assert code == 2
    assert err.startswith("error: --chat: the tokenizer's chat template refuses the conversation (TypeError")
