"""The JSON schema of run configurations, generated: `python -m ssmlora_dist.config.json_schema`."""

from __future__ import annotations

import json
from pathlib import Path

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.durable import write_text

SCHEMA_PATH = Path(__file__).parents[2] / "configs" / "schema.json"


def schema_text() -> str:
    """The content of `configs/schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_text(SCHEMA_PATH, schema_text())
    print(f"wrote {SCHEMA_PATH}")
