"""One run: adapters in the upper layers of a model, trained and scored on hidden states of the layers below.

The layers below the first adapted one are frozen and without adapters, so what they make of a text is always
the same: it is computed once and kept in a file. The model of a run is cut to the layers above.

Shapes: B texts, S tokens, D hidden size, N scored tokens.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.accuracy.plan import METHODS, PROBED_PLACES, RANK, SPLITS, TASK_SETS, Run, Setting
from benchmarks.accuracy.tasks import texts
from ssmlora_dist import AdapterConfig, add_adapters, remove_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.state_means import record_states, replaced_states
from ssmlora_dist.batches import IGNORED_LABEL, Batch
from ssmlora_dist.durable import write_tensors
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import base_fingerprint, decoder_layers, load_config, load_model, load_tokenizer
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.models.stage import PipelineStage, StageLayers
from ssmlora_dist.tokenization import TextEncoder
from ssmlora_dist.training.optimizer import build_optimizer
from ssmlora_dist.training.schedule import learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORED_AT_ONCE = 8
CHUNK_SIZE = 1024
WARMUP_SHARE, CLIP = 0.1, 1.0
BETAS, EPSILON = (0.9, 0.999), 1e-8
# Texts of a run's own training texts: for the mean of a state, and for the gradients of candidate places.
NUM_RECORDED, NUM_PROBED = 16, 8
LAST_STEPS = 16


@dataclass(frozen=True)
class Resources:
    """Where a run finds and leaves things.

    Args:
        model: directory of the model.
        cache: directory of hidden states.
        device: on which it runs.
        babi: directory of the bAbI files.
    """

    model: Path
    cache: Path
    device: str = "cpu"
    babi: Path | None = None


@dataclass(frozen=True)
class Texts:
    """Texts as the upper layers get them.

    Args:
        hidden: [B,S,D] float32, what enters the first of these layers.
        labels: [B,S], the tokens where they are scored, IGNORED_LABEL elsewhere.
    """

    hidden: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Any) -> Texts:
        return Texts(self.hidden[chosen], self.labels[chosen])

    def to(self, device: str) -> Texts:
        """On a device."""
        return Texts(self.hidden.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Scores:
    """Of every text: how many tokens are scored, how many of them are right, and the sum of their losses."""

    targets: list[int]
    correct: list[int]
    losses: list[float]

    @property
    def loss(self) -> float | None:
        """Mean over the tokens; None where it is no number, as in a run that has diverged."""
        mean = math.fsum(self.losses) / sum(self.targets)
        return mean if math.isfinite(mean) else None

    @property
    def accuracy(self) -> float:
        """Share of the tokens."""
        return sum(self.correct) / sum(self.targets)


def num_layers(model: Path) -> int:
    """Decoder layers of a model."""
    return int(load_config(str(model)).get_text_config().num_hidden_layers)


def check(setting: Setting, resources: Resources) -> None:
    """Finds what no run could do.

    Raises:
        ModelError: the model cannot be found, or lacks the layers.
    """
    count = num_layers(resources.model)
    if not 0 < setting.first_layer < count:
        raise ModelError(
            f"--first-layer {setting.first_layer} given; allowed: 1 to {count - 1}, as {resources.model} has "
            f"{count} layers, of which the first is computed once for all runs; change it"
        )


def upper_model(setting: Setting, resources: Resources) -> PreTrainedModel:
    """The layers from the first adapted one on, with norm and head, in float32."""
    count = num_layers(resources.model)
    return _load(resources, StageLayers(setting.first_layer, count, count))


def _load(resources: Resources, stage: StageLayers) -> PreTrainedModel:
    return load_model(
        str(resources.model),
        quantization="none",
        compute_dtype=torch.float32,
        device=resources.device,
        stage=stage,
    )


# ---- texts


@functools.lru_cache(maxsize=16)
def hidden_texts(task: str, split: str, setting: Setting, resources: Resources) -> Texts:
    """The texts of a task for one split, from the file of their hidden states, which is made if need be."""
    tasks = next(set_tasks for set_tasks in TASK_SETS.values() if task in set_tasks)
    of_train = setting.num_train // len(tasks)
    count = {"train": of_train, "validation": setting.num_validation, "test": setting.num_test}[split]
    encoder = TextEncoder(load_tokenizer(str(resources.model)))
    drawn = texts(task, split, count, setting.length, encoder, resources.babi)
    ids = torch.tensor([text.ids for text in drawn])
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, text in enumerate(drawn):
        labels[row, text.targets] = ids[row, text.targets]
    told = (base_fingerprint(str(resources.model)), setting.first_layer, torch.__version__, resources.device)
    name = hashlib.sha256(repr(told).encode() + ids.numpy().tobytes()).hexdigest()[:24]
    path = resources.cache / f"{task}_{split}_{setting.length}_{name}.safetensors"
    if not path.exists():
        resources.cache.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"hidden": _hidden(ids, setting, resources)})
    return Texts(load_file(path)["hidden"], labels)


def _hidden(ids: Tensor, setting: Setting, resources: Resources) -> Tensor:
    stage = PipelineStage(
        _lower_model(setting.first_layer, resources),
        StageLayers(0, setting.first_layer, num_layers(resources.model)),
        CHUNK_SIZE,
    )
    with torch.no_grad():
        pieces = [
            stage(None, Batch.of(piece, input_ids=piece)).cpu()
            for piece in ids.to(resources.device).split(SCORED_AT_ONCE)
        ]
    return torch.cat(pieces)


@functools.lru_cache(maxsize=1)
def _lower_model(first_layer: int, resources: Resources) -> PreTrainedModel:
    return _load(resources, StageLayers(0, first_layer, num_layers(resources.model)))


def prepare(task_sets: Sequence[str], setting: Setting, resources: Resources) -> None:
    """Makes the files of all hidden states of some task sets."""
    for task_set in task_sets:
        for task in TASK_SETS[task_set]:
            for split in ("train", *SPLITS.values()):
                hidden_texts(task, split, setting, resources)
    hidden_texts.cache_clear()
    _lower_model.cache_clear()


def order(run: Run, setting: Setting) -> list[list[int]]:
    """For every task of the set, the texts of the pool that a seed trains on, in order, none twice.

    It depends on task set, length and seed alone: the methods of a pair have the same.
    """
    tasks = TASK_SETS[run.task_set]
    count = setting.steps * setting.batch // len(tasks)
    return [
        random.Random(f"{task}/{run.length}/{run.seed}").sample(range(setting.num_train // len(tasks)), count)
        for task in tasks
    ]


# ---- adapters


@contextmanager
def adapted(
    model: PreTrainedModel, run: Run, probed: Texts, loss: CausalLMLoss
) -> Iterator[tuple[dict[str, nn.Parameter], list[str]]]:
    """Adds the adapters of a run in the body: their parameters by name, and their places, LAYER.PROJECTION.

    Args:
        model: from `upper_model`.
        run: its method and seed.
        probed: training texts, for the method that looks for places.
        loss: of the model.
    """
    config = METHODS[run.method]
    if config is None:
        places = probe_places(model, probed, loss, PROBED_PLACES, run.seed)
        rank = num_trained(model, METHODS["lora"]) // num_trained(model, _lora(1, places=places))
        config = _lora(rank, places=places)
    add_adapters(model, config, seed=run.seed)
    try:
        paths = [path.split(".") for path, module in model.named_modules() if isinstance(module, LoRALinear)]
        yield adapter_parameters(model), [f"{path[2]}.{path[-1]}" for path in paths]
    finally:
        remove_adapters(model)


def probe_places(
    model: PreTrainedModel, probed: Texts, loss: CausalLMLoss, num_places: int, seed: int
) -> tuple[str, ...]:
    """Where adapters would learn most to begin with: at most one linear layer of every decoder layer.

    A candidate LoRA on each linear layer gets the gradient of the texts; what counts is its square, for each
    parameter of the candidate. In every decoder layer the best is taken, and of these the best `num_places`.
    """
    add_adapters(model, _lora(RANK, every_layer="all-linear"), seed=seed)
    try:
        for batch in _batches(probed, 2):
            (loss(_batch(batch)) / _num_labels(batch)).backward()
        best: dict[int, tuple[float, str]] = {}
        for layer_idx, layer in decoder_layers(model).items():
            for path, module in layer.named_modules():
                if isinstance(module, LoRALinear):
                    parameters = [module.lora_A.weight, module.lora_B.weight]
                    squares = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
                    score = squares / sum(p.numel() for p in parameters)
                    name = f"{layer_idx}.{path.rpartition('.')[2]}"
                    best[layer_idx] = max(best.get(layer_idx, (-1.0, "")), (score, name))
    finally:
        remove_adapters(model)
    return tuple(name for _, name in sorted(best.values())[-num_places:])


def _lora(rank: int, **where: Any) -> AdapterConfig:
    return AdapterConfig(method="lora", rank=rank, alpha=2 * rank, alternate=(), **where)


def num_trained(model: PreTrainedModel, config: AdapterConfig | None) -> int:
    """Parameters that a method trains."""
    add_adapters(model, config)
    try:
        return sum(parameter.numel() for parameter in adapter_parameters(model).values())
    finally:
        remove_adapters(model)


# ---- training and scores


def execute(run: Run, setting: Setting, resources: Resources, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Trains and scores; a row for each task of the set, without what it stood on.

    Args:
        run: what to do.
        setting: of its length.
        resources: model, cache and device.
        model: from `upper_model`; without adapters before and after.
    """
    began = time.process_time()
    loss = CausalLMLoss(model, CHUNK_SIZE)
    if loss.uses_own_logits:
        raise ModelError(
            f"{resources.model}: makes its logits in a way of its own, and this study scores hidden states; "
            "name another --model"
        )
    tasks = TASK_SETS[run.task_set]
    pools = [hidden_texts(task, "train", setting, resources) for task in tasks]
    mixed = [pool[chosen] for pool, chosen in zip(pools, order(run, setting), strict=True)]
    # One text of each task in turn.
    train = Texts(
        torch.stack([one.hidden for one in mixed], 1).flatten(0, 1),
        torch.stack([one.labels for one in mixed], 1).flatten(0, 1),
    ).to(resources.device)
    with adapted(model, run, train[:NUM_PROBED], loss) as (parameters, places):
        trained = _train(run, setting, train, loss, parameters)
        scored = {}
        for task in tasks:
            held_out = hidden_texts(task, SPLITS[run.phase], setting, resources).to(resources.device)
            scored[task] = score(loss, held_out), _without_states(model, loss, train, held_out, run)
        gates = [
            p.detach().abs().mean().item() for name, p in parameters.items() if name.endswith("state_gate")
        ]
    shared = {
        **asdict(run),
        "setting": asdict(setting),
        "device": resources.device,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "places": places,
        **trained,
        **({"mean_abs_gate": sum(gates) / len(gates)} if gates else {}),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return [_row(shared, task, *scores) for task, scores in scored.items()]


def _row(shared: Mapping[str, Any], task: str, scores: Scores, without: Scores | None) -> dict[str, Any]:
    row = {
        **shared,
        "task": task,
        "num_targets": sum(scores.targets),
        # A step that was no number has ended the training; the weights before it may still give one.
        "loss": None if shared["diverged"] else scores.loss,
        "accuracy": scores.accuracy,
    }
    if without is not None:
        row |= {"loss_mean_state": without.loss, "accuracy_mean_state": without.accuracy}
    if shared["phase"] == "final":
        losses = [round(loss, 4) if math.isfinite(loss) else None for loss in scores.losses]
        row["texts"] = {"targets": scores.targets, "correct": scores.correct, "losses": losses}
    return row


def _train(
    run: Run, setting: Setting, train: Texts, loss: CausalLMLoss, parameters: dict[str, nn.Parameter]
) -> dict[str, Any]:
    optimizer = build_optimizer(
        "adamw", parameters, learning_rate=run.rate, betas=BETAS, epsilon=EPSILON, weight_decay=0.0
    )
    losses, norms = [], []
    for step, batch in enumerate(_batches(train, setting.batch)):
        rate = learning_rate(
            step,
            schedule="cosine",
            peak=run.rate,
            warmup_steps=round(WARMUP_SHARE * setting.steps),
            num_steps=setting.steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(_batch(batch)) / _num_labels(batch)
        value.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), CLIP)))
        losses.append(value.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(norms[-1]):
            break
        optimizer.step()
        optimizer.zero_grad()
    last = losses[-LAST_STEPS:]
    is_finite = math.isfinite(losses[-1]) and math.isfinite(norms[-1])
    return {
        "diverged": not is_finite,
        "train_loss": sum(last) / len(last) if is_finite else None,
        "max_gradient_norm": max(norms) if is_finite else None,
    }


@torch.no_grad()
def score(loss: CausalLMLoss, held_out: Texts) -> Scores:
    """Of every text, by the head and cross-entropy that training has."""
    scores = Scores([], [], [])
    decoder = loss.model.get_decoder()
    for batch in _batches(held_out, SCORED_AT_ONCE):
        hidden_BSD = decoder(inputs_embeds=batch.hidden, use_cache=False).last_hidden_state
        mask_BS = batch.labels[:, 1:] != IGNORED_LABEL
        loss_N, missed_N = loss.head(
            hidden_BSD[:, :-1][mask_BS], batch.labels[:, 1:][mask_BS], per_token=True
        )
        counts = mask_BS.sum(1).tolist()
        for count, losses, missed in zip(counts, loss_N.split(counts), missed_N.split(counts), strict=True):
            scores.targets.append(count)
            scores.correct.append(count - int(missed.sum()))
            scores.losses.append(losses.double().sum().item())
    return scores


@torch.no_grad()
def _without_states(
    model: PreTrainedModel, loss: CausalLMLoss, train: Texts, held_out: Texts, run: Run
) -> Scores | None:
    """With every state replaced by its mean over training texts; None for what has no state, or is tuned."""
    has_state = any(isinstance(m, LoRALinear) and m.form.has_state for m in model.modules())
    if run.phase == "tuning" or not has_state:
        return None
    with record_states(model) as means:
        for batch in _batches(train[:NUM_RECORDED], SCORED_AT_ONCE):
            model.get_decoder()(inputs_embeds=batch.hidden, use_cache=False)
    with replaced_states(model, means):
        return score(loss, held_out)


def _batches(of: Texts, size: int) -> Iterator[Texts]:
    return (of[at : at + size] for at in range(0, len(of.labels), size))


def _batch(of: Texts) -> Batch:
    return Batch.of(of.labels, inputs_embeds=of.hidden)


def _num_labels(batch: Texts) -> int:
    return int((batch.labels[:, 1:] != IGNORED_LABEL).sum())
