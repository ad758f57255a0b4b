"""The accuracy study: runs of a tiny model of random weights, from texts to rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.accuracy import plan, study, tasks
from benchmarks.accuracy.plan import FINAL_SEEDS, METHODS, TUNING_SEEDS, Run, Setting
from benchmarks.accuracy.rows import read_rows
from benchmarks.accuracy.training import (
    Resources,
    adapted,
    check,
    execute,
    hidden_texts,
    probe_places,
    score,
    upper_model,
)
from ssmlora_dist.batches import IGNORED_LABEL
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_model, load_tokenizer
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.tokenization import TextEncoder

SEED = 20261126
SETTING = Setting("model", 2, length=160, steps=2, batch=2, num_train=8, num_validation=2, num_test=2)
WORDS = "is in the went to took left Where In . ?".split() + [
    word for names in (tasks.FIRST_NAMES, tasks.LAST_NAMES, tasks.THINGS, tasks.ROOMS) for word in names
]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    directory = tmp_path_factory.mktemp("study")
    words = {word: index for index, word in enumerate(["<unk>", "</s>", *WORDS])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(directory / "model")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    return Resources(directory / "model", directory / "cache")


@pytest.fixture(scope="module")
def model(resources: Resources) -> Any:
    return upper_model(SETTING, resources)


def run(method: str, task_set: str = "generated", phase: Any = "tuning", seed: int = 5) -> Run:
    return Run(phase, task_set, SETTING.length, method, 0.01, seed)


def drawn(task: str, resources: Resources) -> list[tasks.Text]:
    encoder = TextEncoder(load_tokenizer(str(resources.model)))
    return tasks.texts(task, "validation", 2, SETTING.length, encoder, None)


@pytest.mark.parametrize("task", ["needles", "tracking", "prose"])
def test_cached_hidden_states_give_the_logits_of_the_whole_model(
    task: str, resources: Resources, model: Any
) -> None:
    """Bitwise: the same layers see the same numbers in the same shapes."""
    ids = torch.tensor([text.ids for text in drawn(task, resources)])
    whole = load_model(str(resources.model), quantization="none", compute_dtype=torch.float32)
    held_out = hidden_texts(task, "validation", SETTING, resources)
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
        found = model(inputs_embeds=held_out.hidden, use_cache=False).logits
    assert torch.equal(found, expected)
    hidden_texts.cache_clear()
    [file] = (resources.cache).glob(f"{task}_validation_*")
    written = file.stat().st_mtime_ns
    assert torch.equal(hidden_texts(task, "validation", SETTING, resources).hidden, held_out.hidden)
    assert file.stat().st_mtime_ns == written, "computed once"


@pytest.mark.parametrize("task", ["needles", "tracking"])
def test_scores_are_those_of_the_whole_models_logits_at_the_answers(
    task: str, resources: Resources, model: Any
) -> None:
    found = score(CausalLMLoss(model, 1024), hidden_texts(task, "validation", SETTING, resources))
    whole = load_model(str(resources.model), quantization="none", compute_dtype=torch.float32)
    for index, text in enumerate(drawn(task, resources)):
        with torch.no_grad():
            logits = whole(torch.tensor([text.ids]), use_cache=False).logits[0]
        answers = torch.tensor([text.ids[at] for at in text.targets])
        before = logits[[at - 1 for at in text.targets]]
        loss = torch.nn.functional.cross_entropy(before, answers, reduction="sum").item()
        assert found.targets[index] == len(text.targets)
        assert found.correct[index] == int((before.argmax(-1) == answers).sum())
        # A sum of six float32 losses of several nats.
        assert found.losses[index] == pytest.approx(loss, rel=1e-5)


def test_the_answers_of_generated_texts_follow_from_what_they_say(resources: Resources) -> None:
    words = ["<unk>", "</s>", *WORDS]
    for text in drawn("needles", resources):
        said = [words[token] for token in text.ids]
        rooms: dict[tuple[str, str], str] = {}
        for at, word in enumerate(said):
            if word == "is" and said[at + 1] == "in":
                rooms[said[at - 2], said[at - 1]] = said[at + 3]
        assert len(text.targets) == tasks.NUM_NEEDLE_QUESTIONS
        for at in text.targets:
            asked = said[at - 5], said[at - 4]
            assert said[at] == rooms[asked]


def test_texts_of_the_splits_differ_and_do_not_depend_on_their_number(resources: Resources) -> None:
    encoder = TextEncoder(load_tokenizer(str(resources.model)))
    found = {
        split: tasks.texts("needles", split, 3, SETTING.length, encoder, None)
        for split in ("train", "validation", "test")
    }
    assert found["validation"][:2] == drawn("needles", resources)
    distinct = {tuple(text.ids) for each in found.values() for text in each}
    assert len(distinct) == 9
    assert all(len(ids) == SETTING.length for ids in distinct)


def test_every_method_leaves_a_row_for_each_task_and_the_model_as_it_was(
    resources: Resources, model: Any
) -> None:
    names = [name for name, _ in model.named_parameters()]
    by_method = {method: execute(run(method, phase="final"), SETTING, resources, model) for method in METHODS}
    assert [name for name, _ in model.named_parameters()] == names
    for method, rows in by_method.items():
        assert [row["task"] for row in rows] == ["needles", "tracking"]
        for row in rows:
            assert not row["diverged"]
            assert math.isfinite(row["loss"])
            assert sum(row["texts"]["correct"]) == round(row["accuracy"] * row["num_targets"])
            assert ("loss_mean_state" in row) == (method in ("paper", "paper_no_carry", "rolled", "gated"))
            assert ("mean_abs_gate" in row) == (method == "gated")
            json.dumps(row, allow_nan=False)
    assert by_method["lora"][0]["places"] == ["2.q_proj", "3.v_proj", "4.q_proj", "5.v_proj"]
    losses = {method: rows[0]["loss"] for method, rows in by_method.items()}
    assert len(set(losses.values())) == len(METHODS), "no two methods are the same"


def test_a_run_is_the_same_bits_again(resources: Resources, model: Any) -> None:
    first, again = (execute(run("paper"), SETTING, resources, model) for _ in range(2))
    assert [row["loss"] for row in first] == [row["loss"] for row in again]
    other = execute(run("paper", seed=6), SETTING, resources, model)
    assert other[0]["loss"] != first[0]["loss"]


def test_a_run_that_diverged_has_no_loss_even_where_its_last_weights_give_a_number(
    resources: Resources, model: Any
) -> None:
    diverging = replace(run("lora"), rate=1e30)
    rows = execute(diverging, SETTING, resources, model)
    assert [(row["diverged"], row["loss"]) for row in rows] == [(True, None)] * 2


def test_the_probe_takes_the_places_of_the_largest_gradients(resources: Resources, model: Any) -> None:
    """At most one a layer, and the parameters of `lora` are enough for them."""
    probed = hidden_texts("prose", "train", SETTING, resources)
    loss = CausalLMLoss(model, 1024)
    every = probe_places(model, probed, loss, 10, seed=5)
    assert sorted(place.partition(".")[0] for place in every) == ["2", "3", "4", "5"]
    assert every[-2:] == probe_places(model, probed, loss, 2, seed=5), "the best come last"
    with adapted(model, run("probe"), probed, loss) as (parameters, places):
        counted = sum(parameter.numel() for parameter in parameters.values())
        assert sorted(places) == sorted(every)
    with adapted(model, run("lora"), probed, loss) as (parameters, _):
        assert counted <= sum(parameter.numel() for parameter in parameters.values())


def test_a_first_layer_that_is_not_there_is_refused(resources: Resources) -> None:
    with pytest.raises(ModelError, match="--first-layer 6 given; allowed: 1 to 5"):
        check(Setting("model", 6, 160, 2, 2, 8, 2, 2), resources)


def test_prose_scores_its_second_half(resources: Resources) -> None:
    labels = hidden_texts("prose", "validation", SETTING, resources).labels
    assert (labels[:, : SETTING.length // 2] == IGNORED_LABEL).all()
    assert (labels[:, SETTING.length // 2 :] != IGNORED_LABEL).all()


def test_the_study_runs_and_goes_on_where_it_was_killed(resources: Resources, tmp_path: Path) -> None:
    """One method on one task set; of a last row that is half-written the run alone is left."""
    rows, cells = tmp_path / "rows.jsonl", [("prose", SETTING.length, "lora")]

    def start(budget_seconds: float | None) -> bool:
        return study.run_all(cells, {SETTING.length: SETTING}, resources, rows, 1, budget_seconds)

    assert start(0.0), "out of time before the first"
    assert not rows.exists()
    assert not start(None)
    found = read_rows(rows)
    assert {row["seed"] for row in found if row["phase"] == "tuning"} == set(TUNING_SEEDS)
    assert [row["seed"] for row in found if row["phase"] == "final"] == list(FINAL_SEEDS)
    assert found[0]["environment"]["packages"]["torch"] == torch.__version__
    kept = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(kept[:-1]) + kept[-1][:50])
    assert plan.next_runs(read_rows(rows), cells) == [plan.run_of(found[-1])]
