"""A tokenizer's chat template: conversations to text; what goes wrong in it is an error of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ssmlora_dist.errors import DataError


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.

    Raises:
        DataError: it has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; use the tokenizer of a chat model (`model.tokenizer`), "
                "or the format 'instruction' (--prompt in place of --chat)"
            )
        self._tokenizer = tokenizer
        templates = tokenizer.chat_template
        self._source = "\n".join(templates.values()) if isinstance(templates, Mapping) else str(templates)
        if isinstance(templates, Mapping) and "default" not in templates:
            raise DataError(
                f"the tokenizer has several chat templates ({', '.join(sorted(templates))}) and none is "
                "called 'default'; rename the one to use in its tokenizer_config.json, or save it as "
                "chat_template.jinja beside it, or name another tokenizer (`model.tokenizer`)"
            )

    def knows_key(self, key: str) -> bool:
        """Whether the template has a word of that name."""
        return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", self._source) is not None

    def knows_role(self, role: str) -> bool:
        """Whether the template has a text of that name, other than as the key of a message."""
        return re.search(rf"(?<![\w\])]\[)(['\"]){re.escape(role)}\1", self._source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        where: str,
        asks: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: as templates take them, at least one.
            tools: definitions of the tools that may be called.
            where: where the conversation came from, for messages.
            asks: whether to end with the prompt for the assistant's next turn.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        import jinja2

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=asks,
                )
            )
        # A template is a program of someone else's: it can raise anything.
        except Exception as error:
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            raise DataError(
                f"{where}: the tokenizer's chat template refuses the conversation ({kind}{error}); mend its "
                "roles or fields (a system message it has no place for can go into the first user's), or use "
                "another template"
            ) from None
