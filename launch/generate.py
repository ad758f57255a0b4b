"""Answers prompts with a trained adapter: `python launch/generate.py --adapter DIR --prompt "..."`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ssmlora_dist.config.arguments import ArgumentParser, run_command
from ssmlora_dist.errors import DataError
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    arguments = _parser().parse_args()
    quiet_libraries()

    import torch

    from ssmlora_dist.config.build import load_trained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_trained(Path(arguments.adapter), path=arguments.model, device=device)
    quiet_libraries()
    limit = arguments.max_new_tokens
    if arguments.retrieval:
        prompt, value = _retrieval(tokenizer, arguments.retrieval)
        print(f"... {tokenizer.decode(prompt[-60:])}")
        print(f"({len(prompt)} tokens; the true value is {value})")
        _answer(model, tokenizer, prompt, limit)
    elif arguments.chat:
        _chat(model, tokenizer, limit)
    else:
        text = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
        _answer(model, tokenizer, tokenizer(text)["input_ids"], limit)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Answer prompts with a trained adapter on its base model.")
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="adapter directory of a run, or PEFT's LoRA")
    add("--model", metavar="PATH", help="the base model, where it is not where it was in training")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="the prompt; by default the standard input")
    add("--chat", action="store_true", help="a conversation, in the model's own chat template")
    add("--retrieval", type=int, metavar="TOKENS", help="ask a generated retrieval question this long")
    return parser


def _answer(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> str:
    """Streams the greedy continuation of a prompt's ids to the standard output and returns it."""
    import torch
    from transformers import TextStreamer

    limit = model.config.max_position_embeddings
    if not prompt or len(prompt) + max_new_tokens > limit:
        given = f"{len(prompt)} tokens and {max_new_tokens} new ones"
        raise DataError(f"--prompt: {given}; allowed: at least 1, {limit} in all; shorten either")
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


def _chat(model: Any, tokenizer: Any, max_new_tokens: int) -> None:
    if tokenizer.chat_template is None:
        raise DataError("--chat: the model's tokenizer has no chat template; use --prompt")
    messages: list[dict[str, str]] = []
    print("(an empty line ends the conversation)")
    while line := _ask():
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, ids, max_new_tokens)})


def _ask() -> str:
    print("> ", end="", flush=True)
    return sys.stdin.readline().strip()


def _retrieval(tokenizer: Any, length: int) -> tuple[list[int], str]:
    """A prompt of the test split, whose keys and values no training saw, and its true value."""
    from ssmlora_dist.data import generate_retrieval

    [example] = generate_retrieval(tokenizer, "test", [length], [0.5], 8, 5, 1, seed=0)
    return example.input_ids[: -example.num_targets].tolist(), str(example.metadata["value"])


if __name__ == "__main__":
    # What nobody reads is not worth computing.
    sys.exit(run_command(main, ends_unread=True))
