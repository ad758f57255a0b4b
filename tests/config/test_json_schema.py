from __future__ import annotations

from typing import Any

from ssmlora_dist.config.json_schema import SCHEMA_PATH, schema_text
from ssmlora_dist.config.schema import RunConfig


def test_the_schema_beside_the_configurations_is_fresh() -> None:
    text = SCHEMA_PATH.read_text(encoding="utf-8")
    assert text == schema_text(), "run: python -m ssmlora_dist.config.json_schema"


def test_every_field_is_described_in_one_line() -> None:
    schema = RunConfig.model_json_schema()
    sections: dict[str, Any] = {"RunConfig": schema, **schema["$defs"]}
    # A section's field says nothing of its own where the section's docstring says the same.
    fields = {
        f"{section}.{key}": field.get("description")
        or sections[field["$ref"].rsplit("/", 1)[1]]["description"]
        for section, content in sections.items()
        for key, field in content["properties"].items()
    }
    assert [name for name, description in fields.items() if not description or "\n" in description] == []
