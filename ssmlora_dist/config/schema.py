"""The run configuration: one frozen pydantic model per section of the JSON file (DESIGN section 5).

A section holds what the user decides; whatever follows from it (gradient accumulation, the DeepSpeed
configuration, storage dtypes) is derived elsewhere and cannot be written twice. The docstring under each
field is its description in `configs/schema.json`, which editors show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.config.paths import expanded
from ssmlora_dist.precision import DTypeName
from ssmlora_dist.rope import RopeParameters

NonEmpty = Annotated[str, Field(min_length=1)]
Names = NonEmpty | Annotated[tuple[NonEmpty, ...], Field(min_length=1)]
UserPath = Annotated[NonEmpty, AfterValidator(expanded)]
"""A file, directory or glob; a leading `~` is a home directory."""
UserPaths = UserPath | Annotated[tuple[UserPath, ...], Field(min_length=1)]
UserDirectory = Annotated[Path, AfterValidator(lambda path: Path(expanded(str(path))))]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Length = Annotated[int, Field(ge=64)]
Metric = Literal["f1", "exact_match", "rouge_l", "string_match_all", "string_match_part"]
# With the endings that directories and files get, within what file systems take.
LONGEST_NAME = 180
LARGEST_SEED = 2**32 - 1  # the widest that every random generator in use accepts


Auto = Literal["auto"]


class Spared(NamedTuple):
    """What spares memory in training, with nothing left to decide.

    Attributes:
        layers_per_checkpoint, offload_checkpoints, mlp_tile_size: see `TrainingSection`.
    """

    layers_per_checkpoint: int
    offload_checkpoints: bool
    mlp_tile_size: int | None


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class RunSection(Section):
    """Name, place and seed of a run; its files lie in `output_dir/name`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)
    """Name of the run and of its directory: letters, digits, `_`, `-` and (not first) `.`."""
    output_dir: UserDirectory = Path("runs")
    """Directory that holds the run directories, relative to the working directory."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of initialisation, data order, generated data and dropout."""
    deterministic: bool = False
    """On GPUs, the same bits in every run; slower. On CPUs they always are."""


class ModelSection(Section):
    """The backbone, whose weights stay frozen."""

    path: UserPath | None = None
    """Directory or hub name of the model; with `init: "random"` only its shapes are read."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` loads the weights; `random` draws them from the seed, for tests and speed."""
    config: dict[str, Any] | None = None
    """Bare transformers configuration with `model_type`, in place of `path`; needs `init: "random"`."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: UserPath | None = None
    """Directory, hub name or the built-in `bytes` (one token per byte); by default that of `path`."""
    rope_parameters: RopeParameters | None = None
    """Scaling of the model's RoPE, for inputs longer than its positions; null: the model's own."""
    compute_dtype: Literal["auto"] | DTypeName = "auto"
    """Dtype of activations, unquantised layers and arithmetic; `auto`: the fastest that the device has."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """`auto`: flash-attention where installed and on CUDA, unless ranks share rows; else sdpa or eager."""


class QuantizationSection(Section):
    """How the frozen linear layers are stored (the embedding and the output head never are quantised)."""

    mode: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """Storage format of the frozen linear layers; `none` keeps them in the compute dtype."""
    double_quantization: bool = True
    """Quantise the block scales of `nf4` and `fp4` too: about 0.4 bits less per parameter."""


class TaskSection(Section):
    """One task: a generated or a published one by its name, or your own over your records."""

    task: NonEmpty
    """A known task, such as `passkey` or `boolq`; for your own a format of `data` whose records ask."""
    name: NonEmpty | None = None
    """What results call it; by default the task."""
    num_examples: int | None = Field(default=None, ge=1)
    """Number of items at most; of a generated task for each length. By default 100 generated, all read."""
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    """Seed of what a generated task draws; by default `run.seed`."""
    lengths: Annotated[tuple[Length, ...], Field(min_length=1)] | None = None
    """Tokens of prompt and answer together, for generated tasks; by default 1024."""
    depths: Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = None
    """Places of the fact in generated tasks, 0 the start and 1 the end, each used in turn."""
    background: UserPaths | None = None
    """Text files in which generated tasks hide their facts; by default Python's language reference."""
    path: UserPaths | None = None
    """Files of records, as in `data`; of the `babilong` tasks the bAbI file."""
    hub: NonEmpty | None = None
    """Name of a data set for the `datasets` library; by default that of the published task."""
    subset: NonEmpty | None = None
    """Subset (configuration) of the hub data set."""
    split: NonEmpty | None = None
    """Split of the hub data set."""
    fields: dict[str, Names] = {}
    """Maps the names that your own task needs to names or paths (`outer.inner`) in the records."""
    prompt: str | None = None
    """Template of the prompt of your own task; by default the format's."""
    answer: str | None = None
    """Template of the answer of your own task, of which any reference is right; by default the format's."""
    choices: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Templates of the choices of `multiple_choice`; by default the texts in the field `choices`."""
    labels: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """What labels mean as positions of choices from 0, where they are neither these nor letters nor texts."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a free answer to your own task has at most; by default 64."""
    stop: tuple[NonEmpty, ...] | None = None
    """Texts before which a free answer to your own task ends; by default the end of the line."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    """Scores of free answers, the first of which stands for the task; by default `f1` and `exact_match`."""


class SourceSection(Section):
    """One source of examples: files (`path`), a data set by its hub name (`hub`), or a generated task."""

    format: Literal[
        "instruction", "generation", "long_document_qa", "multiple_choice", "chat", "text", "task"
    ]
    """What the records are; `task` needs none: a generated task of evaluation, of which this is a split."""
    path: UserPaths | None = None
    """One or more files or globs, relative to the working directory: .jsonl, .parquet or .txt."""
    hub: NonEmpty | None = None
    """Name of a data set for the `datasets` library, in place of `path`."""
    subset: NonEmpty | None = None
    """Subset (configuration) of the hub data set."""
    split: NonEmpty | None = None
    """Split of the hub data set."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of the hub data set; a run keeps to the commit that it is at its first start."""
    fields: dict[str, Names] = {}
    """Maps the names that the format needs to names or paths (`outer.inner`) in the records."""
    prompt: str | None = None
    """Template of the prompt over the record's fields, such as `"{question}"`; by default the format's."""
    answer: str | None = None
    """Template of the answer over the record's fields; by default the format's."""
    choices: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Templates of the answers to choose from, in the order that the label counts."""
    labels: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """What labels mean as positions of choices from 0, where they are neither these nor letters nor texts."""
    limit: int | None = Field(default=None, ge=1)
    """Number of records read at most; by default all."""
    streaming: bool = False
    """Read records while training goes on instead of all of them before; nothing is downloaded ahead."""
    shuffle_buffer_size: int = Field(default=1000, ge=1)
    """Consecutive examples of a stream that are shuffled among each other; 1: none."""
    task: TaskSection | None = None
    """The task of the format `task`, as in `evaluation.tasks`: trained on what evaluation asks."""


class DataSection(Section):
    """What is trained on and what is evaluated."""

    train: SourceSection
    """Examples to train on."""
    validation: SourceSection | None = None
    """Examples to evaluate on; by default there is no evaluation."""
    max_length: int = Field(default=2048, ge=8)
    """Longest row in tokens, prompt and answer together."""
    too_long: Literal["drop", "truncate", "refuse"] = "drop"
    """What happens to longer rows: left out, cut in the prompt, or an error; `text` is always split."""
    packing: bool = False
    """Trains on rows of up to `max_length` tokens that several samples share, none of which sees another."""
    cache_dir: UserDirectory | None = None
    """Where prepared examples are kept, once a node; by default beside the cache of `datasets`."""


class TrainingSection(Section):
    """The loop: batches in sequences, lengths in optimiser steps; max_steps or num_epochs ends it."""

    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps; give this or `num_epochs`."""
    num_epochs: float | None = Field(default=None, gt=0)
    """Number of passes over the training data; give this or `max_steps`."""
    global_batch_size: int = Field(default=16, ge=1)
    """Sequences, or packed rows, per optimiser step, over all ranks and micro-batches."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences per rank in one forward pass; gradient accumulation follows from it."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' variants with 8-bit moments or moments paged to host memory (CUDA)."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    lora_b_learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of `lora_B` over that of `lora_A`: LoRA+ (arXiv 2402.12354)."""
    state_learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the state's matrices over that of `lora_A`."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of AdamW's step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, as a multiple of the learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps of linear warm-up; fewer than `max_steps`."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; null: no clipping."""
    gradient_checkpointing: bool = True
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    layers_per_checkpoint: Annotated[int, Field(ge=1)] | Auto = 1
    """Decoder layers recomputed together: fewer inputs to keep, more activations; `auto`: as memory asks."""
    offload_checkpoints: bool | Auto = False
    """Keep what decoder layers are recomputed from in host memory; `auto`: where a device is too small."""
    mlp_tile_size: Annotated[int, Field(ge=1)] | Auto | None = None
    """Tokens whose activations in MLP and norms exist at one time; null: all; `auto`: as memory asks."""
    compile: bool = False
    """Have torch.compile make code of each decoder layer: minutes at the start, then fewer launches."""
    loss_chunk_size: int = Field(default=1024, ge=1)
    """Tokens whose logits exist at one time in the loss."""
    max_nonfinite_steps: int = Field(default=5, ge=1)
    """Steps in a row skipped for a loss or gradient that is not finite, before training stops."""

    @property
    def is_unsettled(self) -> bool:
        """Whether something that spares memory is `auto` yet: see `planner.settle_memory`."""
        return "auto" in (self.layers_per_checkpoint, self.offload_checkpoints, self.mlp_tile_size)

    @property
    def spared(self) -> Spared:
        """What spares memory, once that is settled."""
        assert not self.is_unsettled, "settle_memory comes first"
        return Spared(*(getattr(self, name) for name in Spared._fields))


class ParallelSection(Section):
    """How the work is spread over ranks."""

    zero_stage: int = Field(default=0, ge=0, le=3)
    """What ZeRO shards over ranks: 0 nothing, 1 optimiser, 2 also gradients, 3 also the backbone."""
    offload_optimizer: bool = False
    """Keep and step the optimiser in host memory; needs `zero_stage` 1 or higher."""
    offload_parameters: bool = False
    """Keep the sharded backbone in host memory; needs `zero_stage` 3."""
    pipeline_stages: int = Field(default=1, ge=1)
    """Number of pipeline stages that the decoder layers are split over; 1: no pipeline."""
    stage_boundaries: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """First layer of every stage, the first of them 0; null: balanced by the cost model."""
    recompute_ahead: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Layers of a stage recomputed while it awaits its gradient; `auto`: as memory allows; 0: none."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Ranks that share the tokens of each row (Ulysses attention), for inputs too long for one; 1: none."""
    timeout_seconds: int = Field(default=1800, ge=10)
    """Seconds that a rank waits for the others before it gives up."""


class CheckpointSection(Section):
    """What is saved on the way, so that a run that was stopped goes on with `--resume`."""

    every_steps: int | None = Field(default=100, ge=1)
    """Optimiser steps between checkpoints; null: only when the run is told to stop."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint of the least validation loss beyond these."""
    grace_seconds: int = Field(default=30, ge=1)
    """Seconds that a run which is told to stop takes at most to save."""


class EvaluationSection(Section):
    """Loss and exact match on `data.validation`, and tasks that are answered freely."""

    every_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between evaluations on `data.validation`; null: only before and after training."""
    num_examples: int | None = Field(default=None, ge=1)
    """Number of validation examples evaluated at most; null: all."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences per rank in one forward pass."""
    tasks: tuple[TaskSection, ...] = ()
    """Tasks for `launch/evaluate.py`, and for training with `tasks_every_steps`."""
    tasks_every_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps between evaluations on `tasks` during training; null: none."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward pass on `tasks` at most, rows times their length with padding and answers."""


class TrackingSection(Section):
    """Where metrics go besides the run directory."""

    tracker: Literal["mlflow", "none"] = "mlflow"
    """`mlflow`, or `none` for the run directory's files alone."""
    uri: NonEmpty | None = None
    """MLflow tracking URI; null: that in MLFLOW_TRACKING_URI, else a sqlite file in `run.output_dir`."""
    experiment: NonEmpty | None = None
    """MLflow experiment; null: that in MLFLOW_EXPERIMENT_ID or _NAME, else `ssmlora_dist`."""
    tags: dict[NonEmpty, str] = {}
    """Tags of the run in MLflow, beside versions and git commit."""
    every_steps: int = Field(default=1, ge=1)
    """Optimiser steps between logged rows."""
    log_adapter: bool = True
    """Store the trained adapter with the run as an artifact."""


class RunConfig(Section):
    """A whole run of ssmlora_dist: `deepspeed launch/train.py --config this.json`."""

    schema_: str | None = Field(default=None, alias="$schema")
    """Path of the JSON schema, for editors."""
    run: RunSection
    """Name, place and seed of the run."""
    model: ModelSection
    """The frozen backbone."""
    quantization: QuantizationSection = QuantizationSection()
    """Storage of the frozen linear layers."""
    adapter: AdapterConfig = AdapterConfig()
    """Where adapters sit and how their state runs through depth."""
    data: DataSection
    """What is trained on and what is evaluated."""
    training: TrainingSection
    """Batches, optimiser, schedule and length of the training."""
    parallel: ParallelSection = ParallelSection()
    """How the work is spread over ranks."""
    checkpoint: CheckpointSection = CheckpointSection()
    """What is saved on the way, and how much of it is kept."""
    evaluation: EvaluationSection = EvaluationSection()
    """How much is evaluated, and when."""
    tracking: TrackingSection = TrackingSection()
    """Where metrics go besides the run directory."""
    deepspeed: dict[str, Any] = {}
    """Native DeepSpeed keys, for experts; keys that other sections decide are refused."""

    def with_auto_dtype(self, name: DTypeName) -> RunConfig:
        """This configuration, `name` being what "auto" stands for in `model.compute_dtype`."""
        if self.model.compute_dtype != "auto":
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"compute_dtype": name})})

    def with_rope(self, rope_parameters: RopeParameters) -> RunConfig:
        """This configuration with another RoPE of the backbone."""
        update = {"rope_parameters": rope_parameters}
        return self.model_copy(update={"model": self.model.model_copy(update=update)})

    def with_places(self, places: tuple[str, ...]) -> RunConfig:
        """This configuration with the places that a probe has chosen."""
        return self.model_copy(update={"adapter": self.adapter.model_copy(update={"places": places})})
