"""Conversations rendered by the tokenizer's own chat template, with the assistant's turns marked.

A turn is trained as what follows the prompt with which the model is asked for it, up to and including the
mark that ends the turn: what the model must produce at generation, no more and no less. The turns of a
conversation share one row as far as its text begins with each of their prompts, token for token; a turn that
is asked for otherwise (templates drop earlier reasoning, or move the system message along) has its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.messages import REASONING, Message
from ssmlora_dist.data.rows import Row, Segment
from ssmlora_dist.errors import DataError
from ssmlora_dist.long_texts import SURROUNDINGS, is_boundary
from ssmlora_dist.tokenization import TextEncoder

Tools = Sequence[dict[str, Any]] | None
_PROBE = "ssmlora probe text"
_LEAST_CHARACTERS = 8


@dataclass(frozen=True)
class _Turn:
    """A turn to be trained.

    Args:
        where: where it came from, for messages.
        prompt: the text with which the model is asked for it.
        text: what the model must answer, its closing included.
        closing: what ends it: a token of its own, or the text behind the content.
    """

    where: str
    prompt: str
    text: str
    closing: str


def chat_rows(
    messages: Sequence[Message], tools: Tools, template: ChatTemplate, encoder: TextEncoder, where: str
) -> list[Row]:
    """The rows of a conversation; every turn to be trained is a target in exactly one of them.

    Args:
        messages: the conversation.
        tools: definitions of the tools that the model may call.
        template: of the tokenizer.
        encoder: of the tokenizer.
        where: where the conversation came from, for messages.

    Raises:
        DataError: the template refuses the conversation, or leaves out a part of it.
    """
    rendering = _Rendering(tools, template, encoder, where)
    if not any(message.calls() for message in messages):
        return rendering.rows(messages)
    try:
        return rendering.rows(messages)
    except DataError as error:
        # Some templates take the arguments of calls as JSON text only.
        try:
            return rendering.rows([message.with_text_arguments() for message in messages])
        except DataError:
            raise error from None


@dataclass(frozen=True)
class _Rendering:
    tools: Tools
    template: ChatTemplate
    encoder: TextEncoder
    where: str

    def rows(self, messages: Sequence[Message]) -> list[Row]:
        trained = [index for index, message in enumerate(messages) if message.is_trained]
        if not trained:
            return [Row(self.where, (), is_framed=False)]
        messages = [self._closed_once(messages, index) for index in range(trained[-1] + 1)]
        whole = self._render(messages)
        self._check_context(messages, whole)
        turns = [self._turn(messages[: index + 1]) for index in trained]
        shared, apart = self._shared_row(whole, turns)
        closings = tuple(dict.fromkeys(turn.closing for turn in turns))
        rows = [
            Row(turn.where, (Segment(turn.prompt), Segment(turn.text, is_target=True)), is_framed=False)
            for turn in apart
        ]
        rows += [Row(self.where, shared, is_framed=False)] if shared else []
        return [replace(rows[0], closings=closings), *rows[1:]]

    def _closed_once(self, messages: Sequence[Message], index: int) -> Message:
        """A message; of the assistant's without the token at its end that the template writes there too."""
        message = messages[index]
        end = self.encoder.spelled_end(message.content) if message.is_assistant else None
        if end is None or not self._around(messages[:index])[1].lstrip().startswith(end):
            return message
        return replace(message, values={**message.values, "content": message.content.removesuffix(end)})

    def _render(self, messages: Sequence[Message], asks: bool = False) -> str:
        values = [message.values for message in messages]
        return self.template.render(values, self.tools, where=self.where, asks=asks)

    def _shared_row(self, whole: str, turns: Sequence[_Turn]) -> tuple[tuple[Segment, ...], list[_Turn]]:
        """The segments of the turns that the whole conversation shows as they are asked for; the others."""
        segments: list[Segment] = []
        apart: list[_Turn] = []
        done = 0
        for turn in turns:
            begin = len(turn.prompt)
            context = whole[done:begin]
            fits = begin >= done and whole.startswith(turn.prompt + turn.text)
            agreeing = self._agreeing(segments, context) if fits else None
            if agreeing is None:
                apart.append(turn)
                continue
            segments = [*agreeing, Segment(turn.text, is_target=True)]
            done = begin + len(turn.text)
        return tuple(segments), apart

    def _agreeing(self, segments: Sequence[Segment], context: str) -> list[Segment] | None:
        """The row so far with `context`, if together they have the tokens of a prompt; else None.

        Tokens that take the white space behind them with them leave none for the next segment.
        """
        if not segments:
            return [Segment(context)]
        *earlier, before, turn = segments
        stripped = context.lstrip()
        swallowed = replace(turn, text=turn.text + context[: len(context) - len(stripped)])
        for last, rest in ((turn, context), (swallowed, stripped)):
            is_same = self._is_boundary(before.text, last.text) and self._is_boundary(
                before.text[-SURROUNDINGS:] + last.text, rest
            )
            if is_same and (last is turn or self._encode_end(turn, last) == self._encode_end(turn, turn)):
                return [*earlier, before, last, Segment(rest)]
        return None

    def _is_boundary(self, left: str, right: str) -> bool:
        return is_boundary(self.encoder, left, right)

    def _encode_end(self, turn: Segment, longer: Segment) -> list[int]:
        """The ids of `longer`, which begins with the text of `turn`, from shortly before the end of that."""
        return self.encoder.encode_continuation(longer.text[max(0, len(turn.text) - SURROUNDINGS) :])

    def _turn(self, messages: Sequence[Message]) -> _Turn:
        """The last of the messages as it is asked for."""
        *earlier, message = messages
        where = f"{self.where}: messages[{len(earlier)}]"
        alone = self._render(messages)
        prompt = self._render(earlier, asks=True) if earlier else self._first_prompt()
        begin = prompt if alone.startswith(prompt) else self._around(earlier)[0]
        text = alone[len(begin) :]
        if not alone.startswith(begin) or not _arrives(message.content, text):
            text = _behind(prompt, message, where) + self._around(earlier)[1]
        self._check_turn(messages, alone, text)
        stripped = text.rstrip()
        # White space behind the closing mark separates turns: generation has stopped by then.
        is_closed = not (message.content and stripped.endswith(message.content))
        text = stripped if is_closed else text
        ending = self.encoder.added_token(text) if is_closed else None
        if ending is None and message.content:
            ending = text.rpartition(message.content)[2]
        return _Turn(where, prompt, text, ending or "")

    def _around(self, earlier: Sequence[Message]) -> tuple[str, str]:
        """What the template puts before and behind the content of a turn after these messages."""
        probe = Message({"role": "assistant", "content": _PROBE}, is_trained=True)
        head, _, closing = self._render([*earlier, probe]).rpartition(_PROBE)
        return head, closing

    def _first_prompt(self) -> str:
        """The prompt for a turn that begins the conversation, which no template can be asked for."""
        head, _ = self._around([])
        probe = Message({"role": "user", "content": _PROBE}, is_trained=False)
        try:
            asked, told = self._render([probe], asks=True), self._render([probe])
        except DataError:
            return head
        asking = asked.removeprefix(told) if asked.startswith(told) else ""
        if not asking:
            # Either what ends a text hides it, or nothing asks for a turn: then white space is the turn's.
            last = head.rstrip().rpartition("\n")[2]
            return head if last and asked.rstrip().endswith(last) else head.rstrip()
        if asking in head:
            return head[: head.rindex(asking) + len(asking)]
        return head + asking[_overlap(head, asking) :]

    def _check_context(self, messages: Sequence[Message], whole: str) -> None:
        """Raises if the template leaves out what is not trained, without a word of its own."""
        if self.tools and not replace(self, tools=None)._differs(messages, whole):
            raise DataError(
                f"{self.where}: the tokenizer's chat template leaves out 'tools'; use a template that takes "
                "them (`model.tokenizer`), or write them into the system message"
            )
        shows_all = _arrive_in_order([message.content for message in messages], whole)
        for index, message in enumerate(messages):
            self._check_calls(messages, index, whole)
            if not message.is_trained and message.content and not shows_all:
                self._check_heeded(messages, index, "content", {"content": _PROBE}, whole)

    def _check_calls(self, messages: Sequence[Message], index: int, text: str) -> None:
        """Raises if the template leaves out one of the calls, or writes its arguments in another language."""
        calls = messages[index].values.get("tool_calls", [])
        for number, call in enumerate(calls):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, dict) and arguments and str(arguments) in text:
                raise DataError(
                    f"{self.where}: messages[{index}]: the tokenizer's chat template writes arguments of "
                    "calls that are no JSON; use another template"
                )
            others = [*calls[:number], *calls[number + 1 :]]
            self._check_heeded(messages, index, "tool_calls", {"tool_calls": others or None}, text)

    def _check_turn(self, messages: Sequence[Message], alone: str, text: str) -> None:
        """Raises if the template leaves out what a turn has beside its content."""
        index, message = len(messages) - 1, messages[-1]
        if not _arrives(message.reasoning(), text):
            key = next(key for key in REASONING if message.values.get(key))
            self._check_heeded(messages, index, key, dict.fromkeys(REASONING), alone)

    def _check_heeded(
        self, messages: Sequence[Message], index: int, key: str, changes: dict[str, Any], text: str
    ) -> None:
        changed = [*messages]
        values = {**messages[index].values, **changes}
        changed[index] = replace(messages[index], values={k: v for k, v in values.items() if v is not None})
        if self._differs(changed, text):
            return
        role = messages[index].values["role"]
        raise DataError(
            f"{self.where}: messages[{index}]: the tokenizer's chat template leaves out {key!r} of the role "
            f"{role!r}; use a template that takes it (`model.tokenizer`), or move it into the content of a "
            "message that is shown, such as the first user's"
        )

    def _differs(self, messages: Sequence[Message], text: str) -> bool:
        try:
            return self._render(messages) != text
        except DataError:
            return True


def _behind(prompt: str, message: Message, where: str) -> str:
    """The content of a turn behind a prompt that begins it, where the template does not show it."""
    content, begun = message.content, prompt.rstrip()
    overlap = _overlap(begun, content)
    if message.calls() or message.reasoning() or overlap < min(3, len(content)):
        raise DataError(
            f"{where}: the tokenizer's chat template leaves out a part of this turn, or renders it otherwise "
            "than it asks for it, so it is unclear what to train; use another template, or take what is left "
            "out (its reasoning, say) from the record"
        )
    rest = content[overlap:]
    return rest.lstrip() if begun != prompt else rest


def _overlap(before: str, after: str) -> int:
    """How many characters at the beginning of `after` the end of `before` has already."""
    return next(k for k in range(min(len(before), len(after)), -1, -1) if before.endswith(after[:k]))


def _arrive_in_order(contents: Sequence[str], text: str) -> bool:
    """Whether a text holds all contents, one behind the other, and each is long enough to be no chance."""
    shown, at = "".join(text.split()), 0
    for content in ("".join(content.split()) for content in contents):
        at = shown.find(content, at) + len(content)
        if content and (len(content) < _LEAST_CHARACTERS or at < len(content)):
            return False
    return True


def _arrives(content: str, text: str) -> bool:
    """Whether a text holds the content, but for white space: as it is, or within JSON."""
    shown = "".join(text.split())
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return any("".join(form.split()) in shown for form in (content, quoted))
