"""Every configuration in configs/ is one that can run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.topology import gradient_accumulation_steps, topology_problems

CONFIGS = sorted(
    path for path in (Path(__file__).parents[2] / "configs").glob("*.json") if path.stem != "schema"
)
RANKS = {"quickstart": (1, 2), "debug_tiny": (1, 2, 3, 4, 6, 8), "llama3_8b_128k": (8, 16, 64)}


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "debug_tiny",
        "llama_ssmlora",
        "llama_lora",
        "llama3_8b_ssmlora",
        "llama3_8b_32k_single_gpu",
        "llama3_8b_128k",
        "llama2_13b_ssmlora",
        "llama2_70b_ssmlora_zero3",
        "qwen3_30b_a3b_ssmlora",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_valid(path: Path) -> None:
    config = load_config(path, check_files=False, world_size=RANKS.get(path.stem, (1,))[0])
    assert config.run.name == path.stem
    assert config.schema_ == "./schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_on_usual_numbers_of_ranks(path: Path) -> None:
    ranks = RANKS.get(path.stem, (1, 2, 4, 8))
    for world_size in ranks:
        config = load_config(path, check_files=False, world_size=world_size)
        assert topology_problems(config, world_size=world_size, device_type="cuda") == []
        assert gradient_accumulation_steps(config, world_size) >= 1


def test_debug_tiny_and_quickstart_run_on_cpu() -> None:
    for path in CONFIGS:
        if path.stem in ("debug_tiny", "quickstart"):
            config = load_config(path, check_files=False, world_size=1, device_type="cpu")
            assert config.quantization.mode == "nf4"


@pytest.mark.parametrize("other", ["llama_lora", "llama_ssmlora_paper"])
def test_the_baseline_differs_in_nothing_but_the_adapter(other: str) -> None:
    ours, baseline = (
        json.loads((CONFIGS[0].parent / f"{name}.json").read_text()) for name in ("llama_ssmlora", other)
    )
    different = {key for key in ours if ours[key] != baseline[key]}
    assert different == {"run", "adapter"}
    assert set(ours) == set(baseline)
