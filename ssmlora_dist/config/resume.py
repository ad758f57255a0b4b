"""What may change when a run is continued from a checkpoint: one table, one pure function.

`python -m ssmlora_dist.config.resume` prints the table as Markdown, for the README.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ssmlora_dist.config.problems import dotted, field_paths
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.shown import shown


@dataclass(frozen=True)
class ResumeRule:
    """One row of the table.

    Args:
        fields: a field, or `section.*` for all fields of a section that have no row of their own.
        may_change: whether they may.
        reason: why.
    """

    fields: str
    may_change: bool
    reason: str


RULES = (
    ResumeRule("$schema", True, "for editors"),
    ResumeRule("run.name", True, "says where the run lies, not what it is"),
    ResumeRule("run.output_dir", True, "says where the run lies, not what it is"),
    ResumeRule("run.seed", False, "the order of the examples, and what is drawn at random, follow from it"),
    ResumeRule("run.deterministic", True, "changes no more than rounding"),
    ResumeRule("model.path", True, "the base model is compared by its fingerprint, wherever it lies"),
    ResumeRule("model.revision", True, "the base model is compared by its fingerprint"),
    ResumeRule("model.init", False, "the adapter was trained on this base model"),
    ResumeRule("model.config", False, "the adapter was trained on this base model"),
    ResumeRule("model.rope_parameters.*", False, "the adapter was trained with these positions"),
    ResumeRule("model.tokenizer", True, "its contents are compared, wherever it lies"),
    ResumeRule(
        "model.compute_dtype", False, "the adapter was trained on numbers of this precision; `auto` keeps it"
    ),
    ResumeRule("model.attention", True, "implementations compute the same but for rounding"),
    ResumeRule("quantization.*", False, "the adapter was trained on the backbone as it is stored"),
    ResumeRule("adapter.form_module", True, "says where the code of a form lies"),
    ResumeRule("adapter.placement", True, "places that were chosen are kept, and none are chosen anew"),
    ResumeRule("adapter.probe_parameters", True, "places that were chosen are kept"),
    ResumeRule("adapter.probe_batches", True, "places that were chosen are kept"),
    ResumeRule("adapter.*", False, "it says what the checkpoint's parameters are and compute"),
    ResumeRule("data.train.path", True, "the contents are compared, wherever they lie"),
    ResumeRule("data.train.hub", True, "the contents are compared, wherever they lie"),
    ResumeRule("data.train.subset", True, "the contents are compared, wherever they lie"),
    ResumeRule("data.train.split", True, "the contents are compared, wherever they lie"),
    ResumeRule("data.train.revision", True, "kept at the commit that it first was, else compared"),
    ResumeRule("data.train.task.name", True, "says what results call it"),
    ResumeRule("data.train.task.path", True, "the contents are compared, wherever they lie"),
    ResumeRule("data.train.task.background", True, "the contents are compared, wherever they lie"),
    ResumeRule("data.train.*", False, "examples seen and examples to come are counted in this data"),
    ResumeRule("data.validation.*", True, "nothing is trained on it; the best loss is sought anew"),
    ResumeRule("data.cache_dir", True, "says where examples are kept, not what they are"),
    ResumeRule("data.max_length", False, "it decides which examples there are"),
    ResumeRule("data.too_long", False, "it decides which examples there are"),
    ResumeRule("data.packing", False, "examples seen are counted in rows"),
    ResumeRule("training.max_steps", True, "train for longer; a decaying schedule is stretched with it"),
    ResumeRule("training.num_epochs", True, "train for longer; a decaying schedule is stretched with it"),
    ResumeRule("training.global_batch_size", False, "steps done and examples seen are counted in it"),
    ResumeRule("training.micro_batch_size", True, "the gradient is that of the global batch"),
    ResumeRule("training.optimizer", False, "the moments in the checkpoint are its own"),
    ResumeRule("training.betas", False, "the moments in the checkpoint were averaged with them"),
    ResumeRule("training.epsilon", False, "scales the moments in the checkpoint"),
    ResumeRule("training.learning_rate", True, "applies from the next step on"),
    ResumeRule("training.lora_b_learning_rate_ratio", True, "applies from the next step on"),
    ResumeRule("training.state_learning_rate_ratio", True, "applies from the next step on"),
    ResumeRule("training.weight_decay", True, "applies from the next step on"),
    ResumeRule("training.schedule", True, "applies from the next step on"),
    ResumeRule("training.warmup_steps", True, "applies from the next step on"),
    ResumeRule("training.max_grad_norm", True, "applies from the next step on"),
    ResumeRule("training.gradient_checkpointing", True, "costs memory or time, changes no number"),
    ResumeRule("training.layers_per_checkpoint", True, "costs memory or time, changes no number"),
    ResumeRule("training.offload_checkpoints", True, "costs memory or time, changes no number"),
    ResumeRule("training.mlp_tile_size", True, "costs memory or time, changes no more than rounding"),
    ResumeRule("training.compile", True, "costs memory or time, changes no more than rounding"),
    ResumeRule("training.loss_chunk_size", True, "costs memory or time, changes no more than rounding"),
    ResumeRule("training.max_nonfinite_steps", True, "says when to give up"),
    ResumeRule("parallel.*", True, "a checkpoint has no topology"),
    ResumeRule("checkpoint.*", True, "says what is kept"),
    ResumeRule("evaluation.*", True, "says what is measured"),
    ResumeRule("tracking.*", True, "says what is recorded"),
    ResumeRule("deepspeed", True, "how the work is done, as far as no other section decides it"),
)


def resume_problems(then: Mapping[str, Any], now: RunConfig) -> list[str]:
    """One line for each field that has changed and must not.

    Args:
        then: the resolved configuration in the checkpoint, in JSON types.
        now: the configuration of the run that is to go on.
    """
    try:
        before = RunConfig.model_validate(dict(then))
    except ValidationError as error:
        problem = error.errors()[0]
        return [
            f"{dotted(problem['loc'])}: {problem['msg']} in the checkpoint's configuration, which is not of "
            "this release; continue with the release that wrote it"
        ]
    old, new = _values(before), _values(now)
    if before.adapter.places and now.adapter.places:
        # They are all that is adapted: the rest may have said how many parameters a probe spends.
        for name in ("alternate", "every_layer", "every_layer_method", "layers"):
            del old[f"adapter.{name}"]
    return [
        f"{field}: {shown(new[field])} given, {shown(old[field])} in the checkpoint; may not change in a run "
        f"that is continued: {rule.reason}; set it back, or begin anew under another run.name"
        for field in old
        if old[field] != new[field] and not (rule := rule_of(field)).may_change
    ]


def rule_of(field: str) -> ResumeRule:
    """The row that speaks of a field: its own, else that of the nearest section around it."""
    by_fields = {rule.fields: rule for rule in RULES}
    sections = [field.rsplit(".", count)[0] for count in range(1, field.count(".") + 1)]
    names = [field, *(f"{section}.*" for section in (field, *sections))]
    return next(by_fields[name] for name in names if name in by_fields)


def leaves() -> list[str]:
    """The dotted paths of all fields that are no sections."""
    key_paths = field_paths()
    inner = {key_path[:-1] for key_path in key_paths}
    return [dotted(key_path) for key_path in key_paths if key_path not in inner]


def markdown_table() -> str:
    """The rules as a Markdown table."""
    rows = ["| setting | may change | because |", "| --- | --- | --- |"]
    rows += [f"| `{rule.fields}` | {'yes' if rule.may_change else 'no'} | {rule.reason} |" for rule in RULES]
    return "\n".join(rows)


def _values(config: RunConfig) -> dict[str, Any]:
    """The value of every field that is no section; null where its section is absent."""
    content = config.model_dump(mode="json", by_alias=True)
    values = {}
    for field in leaves():
        value: Any = content
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        values[field] = value
    return values


if __name__ == "__main__":
    print(markdown_table())
