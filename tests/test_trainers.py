"""Adapted models in Hugging Face's `Trainer` and in TRL's `SFTTrainer`: trained, checkpointed, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from tests.tiny import QV_AND_MLP, VOCAB_SIZE, randomize_adapters, tiny_model, token_ids

NUM_LAYERS = 3
NUM_STEPS = 10
BATCH_SIZE = 2
LENGTH = 7
# What a checkpoint would hold of the base model.
MODEL_FILES = {"config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
CONFIGS = {
    "ssmlora": QV_AND_MLP.model_copy(update={"dropout": 0.1}),
    "lora": AdapterConfig(rank=4, method="lora", alternate=(), every_layer=("q_proj", "v_proj")),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
libraries = pytest.mark.parametrize("library", ["transformers", "trl"])
pytestmark = pytest.mark.filterwarnings("ignore")  # of either library, about its own arguments and renamings


class Resumes:
    """As README has it, before the trainer's own class."""

    def _load_from_checkpoint(self: Any, directory: str, model: Any = None) -> None:
        load_adapter(model or self.model, directory)

    def _load_best_model(self: Any) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1")


def trainer_of(library: str, model: Any, directory: Path, **settings: Any) -> Any:
    """A trainer that saves every half of its steps, with data that do not depend on it."""
    tokens = token_ids(NUM_STEPS * BATCH_SIZE, LENGTH).tolist()
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": NUM_STEPS,
        "save_steps": NUM_STEPS // 2,
        "logging_steps": 1,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "learning_rate": 1e-2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments |= settings
    if library == "transformers":
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        own = type("AdapterTrainer", (Resumes, Trainer), {})
        return own(model, TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows[:2])
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": tokens})
    own = type("AdapterTrainer", (Resumes, trl.SFTTrainer), {})
    return own(
        model,
        trl.SFTConfig(**arguments),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tokenizer(),
    )


def adapted(config: AdapterConfig, **settings: Any) -> Any:
    return add_adapters(tiny_model(num_layers=NUM_LAYERS, **settings), config)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def values(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def frozen_bits(model: Any) -> dict[str, Tensor]:
    """What is packed in 4 bits may look like NaN, which equals nothing."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value.view(torch.uint8).clone() for name, value in frozen.items()}


def assert_bitwise(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not different, f"not the same bit for bit: {', '.join(different)}"


@libraries
@configs
@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_ten_steps_saved_and_resumed(
    library: str, config: AdapterConfig, storage: str, tmp_path: Path
) -> None:
    model = adapted(config, quantization=storage)
    frozen = frozen_bits(model)
    begun = values(model)
    trainer = trainer_of(library, model, tmp_path)
    trainer.train()
    assert len(losses(trainer)) == NUM_STEPS
    # An axis begins with zeros, which teach the first `state_transition` nothing.
    untouched = {name for name in begun if torch.equal(values(model)[name], begun[name])}
    assert all(name.endswith("state_transition") and name[13] in "01" for name in untouched), untouched
    assert_bitwise(frozen_bits(model), frozen)

    half, end = (tmp_path / f"checkpoint-{step}" for step in (NUM_STEPS // 2, NUM_STEPS))
    save_adapter(model, tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        assert (end / file.name).read_bytes() == file.read_bytes()
    assert not {file.name for file in end.iterdir()} & MODEL_FILES
    base = tiny_model(num_layers=NUM_LAYERS, quantization=storage)
    assert_bitwise(values(load_adapter(base, end)), values(model))

    # Neither the starting values nor the state of torch's generator may show.
    resumed = adapted(config, quantization=storage)
    randomize_adapters(resumed, seed=5)
    torch.manual_seed(5)
    again = trainer_of(library, resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(half))
    assert losses(again) == losses(trainer)
    assert_bitwise(values(resumed), values(model))


@libraries
@configs
def test_their_checkpointing_changes_nothing(library: str, config: AdapterConfig, tmp_path: Path) -> None:
    results = []
    for checkpointing in (True, False):
        model = adapted(config)
        trainer = trainer_of(
            library, model, tmp_path, save_strategy="no", gradient_checkpointing=checkpointing
        )
        trainer.train()
        results.append((losses(trainer), values(model)))
    assert results[0][0] == results[1][0]
    assert_bitwise(results[0][1], results[1][1])


@libraries
def test_the_best_adapter_is_loaded_at_the_end(library: str, tmp_path: Path) -> None:
    model = adapted(QV_AND_MLP)
    # The larger loss, so that it is not the last.
    best: dict[str, Any] = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    settings = {**best, "load_best_model_at_end": True, "eval_strategy": "steps"}
    trainer = trainer_of(library, model, tmp_path, **settings, eval_steps=NUM_STEPS // 2)
    trainer.train()
    half = tmp_path / f"checkpoint-{NUM_STEPS // 2}"
    assert Path(trainer.state.best_model_checkpoint) == half
    assert_bitwise(values(model), values(load_adapter(tiny_model(num_layers=NUM_LAYERS), half)))


@libraries
def test_a_model_that_transformers_has_quantised(library: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(num_layers=NUM_LAYERS).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    trainer = trainer_of(library, add_adapters(model, QV_AND_MLP), tmp_path)
    trainer.train()
    assert len(losses(trainer)) == NUM_STEPS
    load_adapter(tiny_model(num_layers=NUM_LAYERS), tmp_path / f"checkpoint-{NUM_STEPS}")
