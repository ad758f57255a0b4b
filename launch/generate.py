"""Answers prompts with a trained adapter: `python launch/generate.py --adapter DIR --prompt "..."`."""

from __future__ import annotations

import sys
from typing import Any

from ssmlora_dist.config.arguments import ArgumentParser, build_adapter_parser, run_command
from ssmlora_dist.devices import device_type
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.answering import decoding_settings, stream_answer
from ssmlora_dist.tokenization import TextEncoder, check_text
from ssmlora_dist.tracking.quiet import quiet_libraries

DEFAULT_LENGTH = 1024


def main() -> None:
    arguments = _parser().parse_args()
    seed = arguments.seed
    settings = decoding_settings(arguments.max_new_tokens, arguments.temperature, arguments.top_p, seed)
    if arguments.prompt is not None:
        check_text(arguments.prompt, "--prompt")
    length = DEFAULT_LENGTH if arguments.length is None else arguments.length
    if arguments.task is not None:
        _check_task(arguments.task, length)
    elif arguments.length is not None:
        raise DataError(f"--length {arguments.length}: is that of a task's question; give --task too")
    quiet_libraries()

    import torch

    from ssmlora_dist.config.build import load_trained
    from ssmlora_dist.models import max_positions
    from ssmlora_dist.tracking import Console

    device = device_type()
    model, tokenizer = load_trained(
        arguments.adapter,
        path=arguments.model,
        quantization=arguments.quantization,
        dtype=arguments.dtype,
        form_module=arguments.form_module,
        device=device,
        warn=Console(enabled=True).warn,
    )
    quiet_libraries()
    limit = max_positions(model.config)
    if seed is not None:
        torch.manual_seed(seed)
    if arguments.task is not None:
        asked, answer = _task(tokenizer, arguments.task, length)
        prompt = TextEncoder(tokenizer).begin(asked)
        print(f"... {tokenizer.decode(prompt[-60:])}")
        print(f"({len(prompt)} tokens; the true answer is{answer})")
        stream_answer(model, tokenizer, prompt, settings, limit)
    elif arguments.chat:
        _chat(model, tokenizer, settings, limit)
    else:
        text = _decoded(sys.stdin.buffer.read()) if arguments.prompt is None else arguments.prompt
        stream_answer(model, tokenizer, TextEncoder(tokenizer).begin(text), settings, limit)


def _parser() -> ArgumentParser:
    parser = build_adapter_parser("Answer prompts with a trained adapter on its base model.")
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=float, metavar="T", help="draw tokens, where by default the likeliest is taken")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that have this share")
    add("--seed", type=int, metavar="N", help="of what is drawn")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="the prompt; by default the standard input")
    add("--chat", action="store_true", help="a conversation, in the model's own chat template")
    add("--task", metavar="NAME", help="ask a question of a generated task of evaluation")
    parser.add_argument(
        "--length",
        type=int,
        metavar="TOKENS",
        help=f"of the task's question (default: {DEFAULT_LENGTH})",
    )
    return parser


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input: is not valid UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x}); "
            "convert it to UTF-8 (iconv does)"
        ) from None


def _chat(model: Any, tokenizer: Any, settings: dict[str, Any], limit: int | None) -> None:
    from ssmlora_dist.data import ChatTemplate

    template, encoder = ChatTemplate(tokenizer), TextEncoder(tokenizer)
    messages: list[dict[str, str]] = []
    print("(an empty line ends the conversation)")
    while line := _ask():
        messages.append({"role": "user", "content": line})
        prompt = template.render(messages, where="--chat", asks=True)
        answer = stream_answer(model, tokenizer, encoder.encode(prompt), settings, limit)
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    print("> ", end="", flush=True)
    return _decoded(sys.stdin.buffer.readline()).strip()


def _check_task(name: str, length: int) -> None:
    from ssmlora_dist.config.tasks import DEEP, FLAT
    from ssmlora_dist.records import nearest_name

    if name not in (known := (*DEEP, *FLAT)):
        raise DataError(
            f"--task {name}: no task that is generated{nearest_name(name, known)}; choose one of: "
            f"{', '.join(known)}"
        )
    if length < 64:
        raise DataError(f"--length {length}: too short for a question; allowed: 64 or more")


def _task(tokenizer: Any, name: str, length: int) -> tuple[str, str]:
    """A prompt of the test split, whose keys and values no training saw, and its true answer."""
    from ssmlora_dist.config.schema import TaskSection
    from ssmlora_dist.config.tasks import task_rows

    section = TaskSection(task=name, lengths=(length,), num_examples=1)
    [row] = task_rows(section, tokenizer, 0, "test")
    question, answer = row.segments
    return question.text, answer.text


if __name__ == "__main__":
    # What nobody reads is not worth computing.
    sys.exit(run_command(main, alone=True, ends_unread=True))
