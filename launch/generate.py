"""Answers prompts with a trained adapter: `python launch/generate.py --adapter DIR --prompt "..."`."""

from __future__ import annotations

import argparse
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
    if arguments.retrieval:
        prompt, value = _retrieval(tokenizer, arguments.retrieval, arguments.seed)
        print(f"... {tokenizer.decode(prompt[-60:])}\n({len(prompt)} tokens; the true value is {value})")
        _answer(model, tokenizer, prompt, arguments)
    elif arguments.chat:
        _chat(model, tokenizer, arguments)
    else:
        text = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
        _answer(model, tokenizer, tokenizer(text)["input_ids"], arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Answer prompts with a trained adapter on its base model.", allow_abbrev=False
    )
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="adapter directory of a run, or PEFT's LoRA"
    )
    parser.add_argument(
        "--model", metavar="PATH", help="the base model, where it is not where it was in training"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt; by default the standard input")
    source.add_argument(
        "--chat", action="store_true", help="a conversation, in the model's own chat template"
    )
    source.add_argument(
        "--retrieval", type=int, metavar="TOKENS", help="ask a generated retrieval question this long"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling and of --retrieval")
    return parser


def _answer(model: Any, tokenizer: Any, prompt: list[int], arguments: argparse.Namespace) -> str:
    """Streams the continuation of a prompt's token ids to the standard output and returns it."""
    import torch
    from transformers import TextStreamer

    limit = model.config.max_position_embeddings
    if not prompt or len(prompt) + arguments.max_new_tokens > limit:
        raise DataError(
            f"--prompt: {len(prompt)} tokens; allowed: 1 to {limit} with --max-new-tokens together"
        )
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature}
        if arguments.temperature > 0
        else {"do_sample": False}
    )
    torch.manual_seed(arguments.seed)
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))


def _chat(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    if tokenizer.chat_template is None:
        raise DataError("--chat: the model's tokenizer has no chat template; use --prompt")
    messages: list[dict[str, str]] = []
    print("(an empty line ends the conversation)")
    while line := input("> ").strip():
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, ids, arguments)})


def _retrieval(tokenizer: Any, length: int, seed: int) -> tuple[list[int], str]:
    """A prompt of the test split that no training saw, and its true value."""
    from ssmlora_dist.data import generate_retrieval

    [example] = generate_retrieval(tokenizer, "test", [length], [0.5], 8, 5, 1, seed)
    return example.input_ids[: -example.num_targets].tolist(), str(example.metadata["value"])


if __name__ == "__main__":
    sys.exit(run_command(main))
