"""Conversations rendered by the tokenizer's own chat template, with the assistant's turns marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssmlora_dist.data.rows import Segment
from ssmlora_dist.errors import DataError


def chat_segments(messages: Any, tokenizer: Any, place: str) -> tuple[Segment, ...]:
    """Renders a conversation up to its last assistant turn.

    A turn is what follows the prompt with which the model is asked for it, up to and including the mark that
    ends the turn: what the model must produce at generation, no more and no less. A turn without content is
    context.

    Args:
        messages: objects with the texts `role` and `content`, in order.
        tokenizer: a transformers tokenizer with a chat template.
        place: where the conversation came from, for messages.

    Returns:
        Segments in order, every assistant turn a target.

    Raises:
        DataError: the messages are malformed, or the template refuses them or renders the turns of the whole
            conversation otherwise than one at a time.
    """
    conversation = _checked(messages, place)
    whole = _render(conversation, tokenizer, place)
    segments: list[Segment] = []
    done = 0
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        prompt = _render(conversation[:index], tokenizer, place, add_generation_prompt=True)
        up_to_turn = _render(conversation[: index + 1], tokenizer, place)
        end = _end_of_turn(whole, up_to_turn, prompt, message["content"].strip())
        if end is None:
            raise DataError(
                f"{place}: the tokenizer's chat template renders messages[{index}] differently in the whole "
                "conversation and on its own, so it is unclear what to train; end the conversation with that "
                "turn, begin it with a user's, or use another template"
            )
        segments += [Segment(whole[done : len(prompt)]), Segment(whole[len(prompt) : end], is_target=True)]
        done = end
    return tuple(segments)


def _end_of_turn(whole: str, up_to_turn: str, prompt: str, content: str) -> int | None:
    """Where the turn after `prompt` ends in the whole conversation; None where it cannot be told.

    Templates may treat the last turn specially (keep its reasoning, say), so `up_to_turn` only tells how a
    turn is closed.
    """
    if not (whole.startswith(prompt) and up_to_turn.startswith(prompt)):
        return None
    at_alone, at = up_to_turn.find(content, len(prompt)), whole.find(content, len(prompt))
    if at_alone < 0 or at < 0:
        return None
    closing = up_to_turn[at_alone + len(content) :]
    # White space after the closing mark separates turns: generation has stopped by then.
    closing = closing.rstrip() or closing
    end = at + len(content)
    return end + len(closing) if whole.startswith(closing, end) else None


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            f"{place}: field 'messages' must be a list of at least one object with role and content; mend "
            "the record, or map `fields.messages` to the right field"
        )
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise DataError(
                    f"{place}: messages[{index}] must be an object whose {key!r} is text; mend the record"
                )
    # Columns of a table give every message every key, null where it has none.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _render(
    messages: list[dict[str, Any]], tokenizer: Any, place: str, add_generation_prompt: bool = False
) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise DataError(
            f"{place}: the tokenizer's chat template refuses the conversation ({error}); mend its roles or "
            "use another template"
        ) from None
    return str(text)
