"""Values as messages show them."""

from __future__ import annotations

import json
from typing import Any

SHOWN_CHARACTERS = 60


def shown(value: Any) -> str:
    """`value` as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
