"""Our evaluation against the standard harness (lm-eval): `python benchmarks/harness_parity.py --data DIR`.

Multiple choice on BoolQ, COPA, WSC, CB-style and RACE-style items, in float32, under the base model and
under the same model with a random SSMLoRA adapter: the log-likelihood of every choice by our runner and by
lm-eval's `HFLM.loglikelihood` on the very same texts. They may differ by 1e-3, and both accuracies, as
lm-eval computes them from its own numbers, must be ours. Then RACE-style items of four choices against the
clock, in turn: we must be at least twice as fast as lm-eval, at its default batch size or at batches of as
many tokens as ours, whichever is faster.

BoolQ, COPA and WSC are read from `DIR/{boolq,copa,wsc}/validation.jsonl`, with the records of the published
data; without `--data`, and always for the other two, records are made up from the prose of the language
reference. A harness number on made-up records means nothing but that the two agree.

The standard harness itself, on any of its tasks, with an adapted model (`pip install lm-eval`):

    from pathlib import Path

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from ssmlora_dist.config.build import load_trained

    model, tokenizer = load_trained(Path("runs/NAME/adapter"), device="cuda")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    print(lm_eval.simple_evaluate(harness, tasks=["boolq", "race"])["results"])
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.data.sources import read_records
from ssmlora_dist.devices import device_type
from ssmlora_dist.errors import DataError, ModelError
from ssmlora_dist.evaluation.items import ChoiceItem, Task
from ssmlora_dist.evaluation.runner import run
from ssmlora_dist.evaluation.tasks.standard import STANDARD, items_of
from ssmlora_dist.models import load_model, load_tokenizer
from ssmlora_dist.prose import sentences, words
from ssmlora_dist.records import Record
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

LogLikelihoods = Sequence[Sequence[float]]

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results" / "harness_parity.jsonl"
TASKS = ("boolq", "copa", "wsc", "cb", "race")
OF_FILES = ("boolq", "copa", "wsc")
TOLERANCE = 1e-3  # of a log-likelihood, in nats; float32 sums in another order differ by a tenth of it
SPEEDUP_FLOOR = 2.0
ARTICLE_WORDS = 300  # some 400 tokens
MAX_BATCH_TOKENS = 4096
SEED = 6
ADAPTER = AdapterConfig(rank=8, alternate=("q_proj", "v_proj"), every_layer=("down_proj",))
TINY = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}


def made_up(name: str, count: int) -> list[Record]:
    """Records of a task, in the published fields, whose texts are prose and whose labels are chance."""
    draw = random.Random(f"{SEED} {name}")
    prose = [text for text in sentences() if 30 <= len(text) <= 200]
    nouns = words()

    def passage(num_words: int) -> str:
        chosen: list[str] = []
        while sum(len(text.split()) for text in chosen) < num_words:
            chosen.append(draw.choice(prose))
        return " ".join(chosen)

    def record() -> dict[str, Any]:
        if name == "boolq":
            question = f"is the {draw.choice(nouns)} a {draw.choice(nouns)}"
            return {"passage": passage(80), "question": question, "label": draw.random() < 0.5}
        if name == "copa":
            texts = {key: draw.choice(prose) for key in ("premise", "choice1", "choice2")}
            return {**texts, "question": draw.choice(["cause", "effect"]), "label": draw.randrange(2)}
        if name == "wsc":
            text = passage(25).split()
            first, second = sorted(draw.sample(range(len(text)), 2))
            spans = {"span1_text": text[first], "span2_text": text[second], "span2_index": second}
            return {"text": " ".join(text), "target": spans, "label": draw.random() < 0.5}
        if name == "cb":
            label = draw.choice(["entailment", "contradiction", "neutral"])
            return {"premise": passage(40), "hypothesis": draw.choice(prose).rstrip("."), "label": label}
        options = [" ".join(draw.choice(prose).split()[: draw.randrange(2, 12)]) for _ in range(4)]
        question = f"What does the writer say of the {draw.choice(nouns)}?"
        answer = draw.choice("ABCD")
        return {"article": passage(ARTICLE_WORDS), "question": question, "options": options, "answer": answer}

    return [Record(record(), f"made up:{number}") for number in range(1, count + 1)]


def task_of(name: str, count: int, data: Path | None) -> tuple[Task, list[ChoiceItem], str]:
    """A task of so many items, these items, and where they come from."""
    records: Iterable[Record] = made_up(name, count)
    source = "made up"
    if data is not None and name in OF_FILES:
        records, source = read_records(path=str(data / name / "validation.jsonl"), limit=count), "published"
    items = [item for item in items_of(STANDARD[name], records) if isinstance(item, ChoiceItem)]
    if len(items) < count:
        raise DataError(f"{name}: {len(items)} of {count} records can be used; name others with --data")
    return Task(name, lambda: iter(items), STANDARD[name].score, "acc"), items, source


def ours(task: Task, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Our rows."""
    return run([task], model, tokenizer, max_batch_tokens=MAX_BATCH_TOKENS)


def theirs(items: Sequence[ChoiceItem], harness: Any) -> LogLikelihoods:
    """The harness' log-likelihoods of the same prompts and choices."""
    from lm_eval.api.instance import Instance

    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    values = iter(value for value, _ in harness.loglikelihood(requests, disable_tqdm=True))
    return [[next(values) for _ in item.choices] for item in items]


def harness_accuracies(items: Sequence[ChoiceItem], log_likelihoods: LogLikelihoods) -> list[float]:
    """acc and acc_norm as the harness has them: it keeps the space before a choice apart from the choice."""
    right = [0, 0]
    for item, values in zip(items, log_likelihoods, strict=True):
        lengths = [len(choice[1:]) for choice in item.choices]
        per_character = [value / length for value, length in zip(values, lengths, strict=True)]
        for metric, of_metric in enumerate((values, per_character)):
            right[metric] += max(range(len(values)), key=of_metric.__getitem__) == item.label
    return [count / len(items) for count in right]


def compare(
    task: Task, items: Sequence[ChoiceItem], model: Any, tokenizer: Any, harness: Any
) -> dict[str, Any]:
    """What both find on the same items."""
    rows = ours(task, model, tokenizer)
    failed = [row["error"] for row in rows if "error" in row]
    if failed:
        raise RuntimeError(f"{task.name}: {len(failed)} items failed, the first: {failed[0]}")
    expected = theirs(items, harness)
    pairs = zip(
        (value for row in rows for value in row["log_likelihoods"]),
        (value for values in expected for value in values),
        strict=True,
    )
    differences = [abs(a - b) for a, b in pairs]
    accuracies = [statistics.mean(row["scores"][name] for row in rows) for name in ("acc", "acc_norm")]
    expected_accuracies = harness_accuracies(items, expected)
    return {
        "num_items": len(items),
        "num_choices": len(differences),
        "max_abs_difference": max(differences),
        "mean_log_likelihood": statistics.mean(value for values in expected for value in values),
        "acc": accuracies[0],
        "harness_acc": expected_accuracies[0],
        "acc_norm": accuracies[1],
        "harness_acc_norm": expected_accuracies[1],
        "agrees": max(differences) <= TOLERANCE
        and all(abs(a - b) < 1e-9 for a, b in zip(accuracies, expected_accuracies, strict=True)),
    }


def adapt(model: Any) -> None:
    """Adds a SSMLoRA adapter whose every parameter counts."""
    add_adapters(model, ADAPTER, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "lora_A" not in name:
                parameter.copy_(drawn * (0.02 if "lora_B" in name else 0.2))


def race(num_items: int, repeats: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds that we and the harness need for the same four-choice items, in turn."""
    task, items, _ = task_of("race", num_items, None)
    num_tokens = [len(tokenizer(item.prompt)["input_ids"]) for item in items]
    batch_size = max(1, MAX_BATCH_TOKENS // max(num_tokens))
    contestants: dict[str, Callable[[], object]] = {"ours": lambda: ours(task, model, tokenizer)}
    for rows in sorted({1, batch_size}):
        harness = harness_of(model, tokenizer, rows)
        contestants[f"harness, batch size {rows}"] = lambda harness=harness: theirs(items, harness)  # type: ignore[misc]
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            wall_started, cpu_started = time.perf_counter(), time.process_time()
            contestant()
            wall[name].append(time.perf_counter() - wall_started)
            cpu[name].append(time.process_time() - cpu_started)
    medians = {name: statistics.median(seconds) for name, seconds in wall.items()}
    speedup = min(seconds for name, seconds in medians.items() if name != "ours") / medians["ours"]
    return {
        "num_items": num_items,
        "median_prompt_tokens": statistics.median(num_tokens),
        "repeats": repeats,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "median_wall_seconds": medians,
        "speedup": speedup,
        "fast_enough": speedup >= SPEEDUP_FLOOR,
    }


def harness_of(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The standard harness around our model."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def load(model: str, device: str) -> tuple[Any, Any]:
    """The backbone in float32, and its tokenizer."""
    settings: dict[str, Any] = {"quantization": "none", "compute_dtype": torch.float32, "device": device}
    if model == "tiny":
        return load_model(init="random", config=TINY, seed=SEED, **settings), load_tokenizer("bytes")
    if not (Path(model) / "config.json").is_file():
        raise ModelError(
            f"{model}: holds no model; make it with launch/prepare_smollm2.py, or name one: --model"
        )
    return load_model(model, **settings), load_tokenizer(model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Our evaluation against the standard harness.")
    add = parser.add_argument
    add(
        "--model",
        default=str(SMOLLM2),
        metavar="DIR",
        help="or `tiny`, of random weights (default: %(default)s)",
    )
    add("--data", type=Path, metavar="DIR", help="holds boolq, copa and wsc; by default they are made up")
    add("--items", type=int, default=50, metavar="N", help="of each task (default: %(default)s)")
    add("--timed-items", type=int, default=16, metavar="N", help="0 times nothing (default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="of the timing (default: %(default)s)")
    add("--out", type=Path, default=RESULTS, help="rows are added here (default: %(default)s)")
    return parser


def _show(task: str, state: str, row: dict[str, Any]) -> None:
    print(
        f"{task:6} {state:8} {row['num_items']:5} {row['num_choices']:7} {row['max_abs_difference']:10.1e}"
        f" {row['acc']:6.2f} {row['harness_acc']:7.2f} {row['acc_norm']:9.2f} {row['harness_acc_norm']:7.2f}"
        f"{'' if row['agrees'] else '  DIFFERS'}",
        flush=True,
    )


def main() -> int:
    arguments = _parser().parse_args()
    quiet_libraries()
    device = device_type()
    model, tokenizer = load(arguments.model, device)
    quiet_libraries()
    harness = harness_of(model, tokenizer, batch_size=4)
    common = {
        "benchmark": "harness_parity",
        "model": Path(arguments.model).name,
        "device": device,
        "dtype": "float32",
        "num_threads": torch.get_num_threads(),
        "max_batch_tokens": MAX_BATCH_TOKENS,
        "lm_eval": importlib.metadata.version("lm-eval"),
    }
    print(f"{'task':6} {'model':8} items choices difference    acc lm-eval  acc_norm lm-eval")
    passed: list[bool] = []
    of_base: dict[str, float] = {}
    for state in ("base", "adapted"):
        if state == "adapted":
            adapt(model)
        for name in TASKS:
            task, items, source = task_of(name, arguments.items, arguments.data)
            row = compare(task, items, model, tokenizer, harness)
            passed.append(row["agrees"])
            if state == "base":
                of_base[name] = row["mean_log_likelihood"]
            elif row["mean_log_likelihood"] == of_base[name]:
                raise RuntimeError(f"{name}: the adapter changes nothing, so nothing is shown")
            append_row(arguments.out, {**common, "state": state, "task": name, "records": source, **row})
            _show(name, state, row)
    if arguments.timed_items:
        row = race(arguments.timed_items, arguments.repeats, model, tokenizer)
        passed.append(row["fast_enough"])
        append_row(arguments.out, {**common, "state": "adapted", "task": "race, timed", **row})
        print(
            f"\n{row['num_items']} items of four choices, {row['median_prompt_tokens']:.0f} tokens; medians:"
        )
        for name, seconds in row["median_wall_seconds"].items():
            print(f"{name:24} {seconds:8.2f} s")
        verdict = "" if row["fast_enough"] else f"; MISSED: at least {SPEEDUP_FLOOR:g}"
        print(f"{row['speedup']:.1f} times as fast as the faster of lm-eval's{verdict}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
