"""What a run says of itself before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import DatasetReport
from ssmlora_dist.training import header
from ssmlora_dist.training.data import account_lines
from ssmlora_dist.training.header import device_text, run_header
from ssmlora_dist.training.resume_point import ResumePoint

from ..decoders import bare_config
from ..tiny import tiny_config

CPU = torch.device("cpu")
DTYPE = {"compute_dtype": "float32"}
CPU_INFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\nmodel name\t: Some CPU @ 2 GHz\n"


def config(**sections: Any) -> RunConfig:
    base = {
        "run": {"name": "run"},
        "model": {
            "init": "random",
            "config": tiny_config(),
            "tokenizer": "bytes",
            "compute_dtype": "float32",
        },
        "adapter": {"rank": 4},
        "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
        "training": {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
        "tracking": {"tracker": "none"},
    }
    return RunConfig.model_validate(base | sections)


@pytest.fixture(autouse=True)
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPU_INFO)
    monkeypatch.setattr(header, "_CPU_INFO", file)
    monkeypatch.setattr(header.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def facts(config: RunConfig, world_size: int = 1, **changes: Any) -> dict[str, str]:
    settings: dict[str, Any] = {
        "num_steps": 10,
        "num_examples": 32,
        "num_rows": 32,
        "accounts": account_lines("train", DatasetReport(40, 32, 8)),
        "resume_point": ResumePoint(),
    }
    text = run_header(config, CPU, world_size, **(settings | changes))
    return {line[:13].rstrip(): line[13:] for line in text.splitlines()}


def test_all_facts_of_a_run() -> None:
    assert facts(config()) == {
        "device": "cpu, Some CPU @ 2 GHz, 2 cores, 2 threads",
        "ranks": "1, ZeRO stage 0",
        "model": "random weights (llama)",
        "computes in": "float32, attention sdpa",
        "quantised": "nf4 of the projections, scales in 8 bits too",
        "adapts": "ssmlora in turn on q_proj (16 -> 16), v_proj (16 -> 8)",
        # Three q_proj of 16 -> 16 and three v_proj of 16 -> 8 at rank 4, each with two matrices of the state.
        "parameters": "864 trained, 13,872 frozen",
        "batch": "8 = 1 ranks x 4 micro-batches x 2 sequences",
        "recompute": "layer by layer",
        # Rows of 2,048 tokens twice; 864 parameters with their gradients, and two moments of each.
        "memory": "6.53 MiB a rank, for rows of 2,048 tokens (frozen backbone 14.99 KiB, adapters and their "
        "gradients 6.75 KiB, optimiser 6.75 KiB, kept for the backward pass 2.50 MiB, one layer, or the loss "
        "4.01 MiB)",
        "steps": "10 = 2.50 epochs of 32 examples",
        "train": "32 examples of 40 rows; left out: 8 longer than max_length",
        "writes to": "runs/run",
        "recorded": "in its own files alone",
        "begins": "at step 0",
    }


def test_fused_and_skipped_projections_show() -> None:
    fused = {"init": "random", "config": bare_config("phi3"), "tokenizer": "bytes", **DTYPE}
    adapter = {"alternate": ["qkv_proj"], "every_layer": "all-linear", "rank": 4}
    assert facts(config(model=fused, adapter=adapter))["adapts"] == (
        "ssmlora in turn on qkv_proj (16 -> 32); lora on o_proj (16 -> 16), gate_up_proj (16 -> 48), "
        "down_proj (24 -> 16)"
    )
    mixed = {"init": "random", "config": bare_config("glm4_moe"), "tokenizer": "bytes", **DTYPE}
    adapter = {"alternate": [], "every_layer": ["mlp.down_proj", "up_proj"], "rank": 4}
    assert facts(config(model=mixed, adapter=adapter))["adapts"] == (
        "lora on mlp.down_proj (24 -> 16, not in layers 1, 2, 3), up_proj (16 -> 24 or 16 -> 8)"
    )


def test_how_experts_are_stored_shows(tmp_path: Path) -> None:
    def quantised(model: dict[str, Any], mode: str) -> str:
        section = {"tokenizer": "bytes", **DTYPE, **model}
        return facts(config(model=section, quantization={"mode": mode}))["quantised"]

    drawn = {"init": "random", "config": bare_config("gpt_oss")}
    assert quantised(drawn, "int8") == "int8 of the projections and experts"
    assert quantised(drawn, "none") == "none"
    packed = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(bare_config("gpt_oss") | packed))
    stored = {"init": "pretrained", "path": str(tmp_path)}
    assert quantised(stored, "nf4") == (
        "nf4 of the projections and experts (these are stored in mxfp4), scales in 8 bits too"
    )
    assert quantised(stored, "none") == "none (the experts, stored in mxfp4, become float32)"


def test_topology() -> None:
    staged = config(parallel={"pipeline_stages": 2, "zero_stage": 1, "offload_optimizer": True})
    told = facts(staged, world_size=4)
    assert told["ranks"] == "4 = 2 data parallel x 2 stages, ZeRO stage 1, optimizer in host memory"
    assert told["batch"] == "8 = 2 replicas x 2 micro-batches x 2 sequences"
    sharded = config(parallel={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True})
    assert facts(sharded, 2)["ranks"] == "2, ZeRO stage 3, optimizer and parameters in host memory"


def test_what_is_recomputed() -> None:
    def told(model: str, **training: Any) -> str:
        section = {"init": "random", "config": bare_config(model), "tokenizer": "bytes", **DTYPE}
        return facts(config(model=section, training={"max_steps": 10, **training}))["recompute"]

    assert told("llama", gradient_checkpointing=False) == "nothing"
    assert told("llama", compile=True) == "layer by layer; decoder layers are compiled"
    spared = {"layers_per_checkpoint": 2, "offload_checkpoints": True, "mlp_tile_size": 2048}
    assert told("glm4_moe", **spared) == (
        "2 layers at a time, from checkpoints in host memory; MLPs and norms in tiles of 2048 tokens, "
        "MLPs whole in 3 layers with experts or without an MLP of its own"
    )


def test_where_it_begins_and_is_recorded() -> None:
    step_20: Any = SimpleNamespace(step=20)
    path = Path("runs/other/checkpoints/step-00000020")
    mlflow = {"tracker": "mlflow", "uri": "https://me:secret@tracking.example", "experiment": "mine"}
    told = facts(config(tracking=mlflow), resume_point=ResumePoint(step_20, path), num_examples=None)
    assert told["recorded"] == (
        'MLflow at https://***@tracking.example (tracking.uri), experiment "mine" (tracking.experiment)'
    )
    assert told["begins"] == f"after step 20, from {path}, as a new run"
    assert told["steps"] == "10"
    assert facts(config(), resume_point=ResumePoint(step_20, path, in_place=True))["begins"] == (
        f"after step 20, from {path}"
    )


def test_what_is_stored_and_chosen() -> None:
    dense = config(quantization={"mode": "none"})
    assert facts(dense)["quantised"] == "none"
    gemma = {"init": "random", "config": tiny_config("gemma2"), "tokenizer": "bytes"}
    assert facts(config(model=gemma | {"compute_dtype": "bfloat16"}))["computes in"] == (
        "bfloat16, attention eager"
    )


def test_a_device_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=79 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device_text(torch.device("cuda")) == "cuda, NVIDIA H100, 79 GiB"


def test_it_says_which_layers_are_adapted() -> None:
    some = {"rank": 4, "layers": [0, 1, 2, 4, -1], "every_layer": ["up_proj"], "alternate": []}
    assert facts(config(adapter=some))["adapts"] == "lora on up_proj (16 -> 24), in layers 0-2, 4-5"
    exact = {"rank": 4, "places": ["5.v_proj", "0.q_proj", "1.q_proj", "3.up_proj", "3.q_proj"]}
    assert facts(config(adapter=exact))["adapts"] == (
        "ssmlora in 5 places: q_proj (16 -> 16) in layers 0-1, 3; up_proj (16 -> 24) in layers 3; "
        "v_proj (16 -> 8) in layers 5"
    )


def test_before_a_probe_it_counts_as_configured() -> None:
    probe = {"rank": 4, "placement": "probe", "probe_batches": 2}
    found, plain = facts(config(adapter=probe)), facts(config())
    assert found["adapts"] == (
        "ssmlora in places that a probe of 2 micro-batches is going to choose, with at most 864 parameters; "
        f"planned as configured: {plain['adapts']}"
    )
    assert found["parameters"] == f"{plain['parameters']}, as configured"
    chosen = facts(config(adapter=probe).with_places(("1.up_proj",)))
    assert chosen["adapts"] == "ssmlora in 1 places: up_proj (16 -> 24) in layers 1"
    assert chosen["parameters"] == "192 trained, 13,872 frozen"
