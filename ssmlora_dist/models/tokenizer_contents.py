"""What of a tokenizer decides the examples that are made with it."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

# Of `strftime`; with a `-` before numbers, which leaves out their leading zero.
_DIRECTIVES = "aAbBcdeFGHIjklmMnpPrRsSTuUVwWxXyYzZ"


def tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """A digest of each part of a tokenizer that examples are made of, wherever it lies, by what it is called.

    Args:
        tokenizer: a transformers tokenizer, as loaded.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        vocabulary = json.loads(backend.to_str())
        # Of the call before, not of the tokenizer.
        vocabulary |= {"truncation": None, "padding": None}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    parts = {"vocabulary": vocabulary, "special tokens": special, "chat template": tokenizer.chat_template}
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
        for name, part in parts.items()
    }


def fix_date(tokenizer: Any, moment: datetime) -> None:
    """Has chat templates that print the date or the time print those of `moment`.

    Otherwise a run that goes on tomorrow would train other examples than one that is not stopped. The clock
    of transformers (`strftime_now`) cannot be replaced from outside: a macro in the template takes its name.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _dated(text, moment) for name, text in template.items()}
    elif template is not None:
        tokenizer.chat_template = _dated(template, moment)


def _dated(template: str, moment: datetime) -> str:
    if "strftime_now" not in template:
        return template
    # None but those that are printed: of a template with the day alone, two starts of a day make the same.
    printed = [name for flag in ("-", "") for key in _DIRECTIVES if (name := f"%{flag}{key}") in template]
    values = {name: moment.strftime(name) for name in printed}
    replaced = "".join(f"|replace({key!r},{value!r})" for key, value in values.items() if key != value)
    # The line break goes with the block before it, so that the template begins a line as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
