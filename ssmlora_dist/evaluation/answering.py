"""One prompt answered on the standard output, as the answer comes: greedily, or drawn."""

from __future__ import annotations

import math
from typing import Any

from ssmlora_dist.errors import DataError


def decoding_settings(
    max_new_tokens: int, temperature: float | None = None, top_p: float | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Keywords of `stream_answer`: the likeliest token is taken, unless something says how to draw.

    Args:
        max_new_tokens: of an answer.
        temperature: divides the logits.
        top_p: draw from the likeliest tokens that have this share of the probability together.
        seed: of what is drawn; None draws anew every time.

    Raises:
        DataError: a value is out of its range, or there is nothing that a seed would decide.
    """
    draws = temperature is not None or top_p is not None
    allowed = {
        "--max-new-tokens": (max_new_tokens, max_new_tokens >= 1, "1 or more"),
        "--temperature": (temperature, temperature is None or 0 < temperature < math.inf, "above 0"),
        "--top-p": (top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        "--seed": (seed, seed is None or 0 <= seed < 2**63, "0 or more"),
    }
    for option, (value, is_allowed, words) in allowed.items():
        if not is_allowed:
            raise DataError(f"{option} {value}: allowed: {words}; give that, or leave it out")
    if not draws:
        if seed is not None:
            raise DataError(f"--seed {seed}: nothing is drawn without --temperature or --top-p; give one")
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": True,
        "temperature": temperature or 1.0,
        "top_p": top_p or 1.0,
        # By default transformers draws from the 50 likeliest alone.
        "top_k": 0,
    }


def stream_answer(
    model: Any, tokenizer: Any, prompt: list[int], settings: dict[str, Any], limit: int | None
) -> str:
    """Writes the continuation of a prompt to the standard output, token by token.

    Args:
        model: a causal language model whose generation configuration says where answers end, and no more.
        tokenizer: its tokenizer.
        prompt: ids.
        settings: see `decoding_settings`.
        limit: the most tokens that the model takes; None: any number.

    Returns:
        The answer, without what ends it.

    Raises:
        DataError: the prompt is empty, or with its answer longer than the model takes.
    """
    import torch
    from transformers import TextStreamer

    max_new_tokens = settings["max_new_tokens"]
    if not prompt or (limit is not None and len(prompt) + max_new_tokens > limit):
        given = f"{len(prompt)} tokens and {max_new_tokens} new ones"
        in_all = "" if limit is None else f", {limit} in all"
        raise DataError(
            f"prompt: {given}; allowed: at least 1{in_all}; change its length or --max-new-tokens, or train "
            "with model.rope_parameters that reach further"
        )
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **settings,
    )
    answer = str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    for text in model.generation_config.stop_strings or ():
        answer = answer.partition(text)[0]
    return answer
