"""`launch/convert.py` and `launch/merge.py`: what they write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.models import load_model
from ssmlora_dist.training.checkpoints import write_checkpoint
from tests.tiny import QV_AND_MLP, adapted_model, randomize_adapters, tiny_model, token_ids
from tests.training.checkpoint_cases import BASE, checkpoint

from .conftest import SCRIPTS_WORKER
from .processes import ROOT, Finished, run, without_progress

CONVERT_SCRIPT, MERGE_SCRIPT = ROOT / "launch" / "convert.py", ROOT / "launch" / "merge.py"
LORA = AdapterConfig(method="lora", rank=4)
# Float32: one product in place of three, so that the same terms are added in another order.
LOGITS_TOLERANCE = 2e-5

COMMANDS = {
    "converted": ["convert", "--checkpoint", "checkpoints/step-00000010", "--out", "converted"],
    "convert_again": ["convert", "--checkpoint", "checkpoints/step-00000010", "--out", "converted"],
    "convert_damaged": ["convert", "--checkpoint", "checkpoints/step-00000020", "--out", "damaged"],
    "convert_nowhere": ["convert", "--checkpoint", "checkpoints/step-00000030", "--out", "nowhere"],
    "merged": ["merge", "--adapter", "lora", "--out", "merged"],
    "merged_moved": ["merge", "--adapter", "lora", "--out", "merged_moved", "--model", "moved"],
    "merge_again": ["merge", "--adapter", "lora", "--out", "merged"],
    "merge_state": ["merge", "--adapter", "checkpoints/step-00000010", "--out", "state"],
    "merge_nothing": ["merge", "--adapter", "nothing", "--out", "nothing_merged"],
}
REFUSED = {
    "convert_again": "converted: exists, and nothing in it is overwritten; choose another --out",
    "convert_damaged": "step-00000020/optimizer.safetensors: its checksum is not the manifest's",
    "convert_nowhere": "checkpoints/step-00000030: no such checkpoint; correct the path",
    "merge_again": "merged: exists, and nothing in it is overwritten; choose another --out",
    "merge_state": '"ssmlora" cannot be merged: it adds more than a product of input and weight',
    "merge_nothing": "nothing: no such adapter directory; train one first, or correct the path",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finished]]:
    """The directory, and what each command left; all of them run in one process."""
    directory, aside = tmp_path_factory.mktemp("convert_and_merge"), tmp_path_factory.mktemp("aside")
    parameters = {name: p.detach() for name, p in adapter_parameters(adapted_model()).items()}
    for step in (10, 20):
        whole = checkpoint(step, parameters=parameters, moments={})
        path = write_checkpoint(directory / "checkpoints", whole, QV_AND_MLP, BASE)
    content = bytearray((path / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(content)
    for name in ("base", "moved"):
        tiny_model().save_pretrained(directory / name)
    model = add_adapters(
        load_model(str(directory / "base"), quantization="none", compute_dtype=torch.float32), LORA
    )
    randomize_adapters(model)
    save_adapter(model, directory / "lora")

    scripts = {"convert": str(CONVERT_SCRIPT), "merge": str(MERGE_SCRIPT)}
    commands = [[scripts[command], *arguments] for command, *arguments in COMMANDS.values()]
    (aside / "commands.json").write_text(json.dumps(commands))
    files = [str(aside / "commands.json"), str(aside / "results.json")]
    worker = run(["-m", SCRIPTS_WORKER, *files], directory, CUDA_VISIBLE_DEVICES="")
    assert worker.exit_code == 0, worker.stderr
    results = json.loads((aside / "results.json").read_text())
    return directory, {
        name: Finished(code, stdout, without_progress(stderr))
        for name, (code, stdout, stderr) in zip(COMMANDS, results, strict=True)
    }


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(finished: tuple[Path, dict[str, Finished]], name: str) -> None:
    directory, outcomes = finished
    assert outcomes[name].exit_code == 2, outcomes[name].stderr
    assert outcomes[name].stderr.startswith("error: ")
    assert REFUSED[name] in outcomes[name].stderr
    assert outcomes[name].stdout == ""
    new = {path.name for path in directory.iterdir()}
    assert new == {"checkpoints", "base", "moved", "lora", "converted", "merged", "merged_moved"}


def test_the_adapter_in_a_checkpoint_comes_out(finished: tuple[Path, dict[str, Finished]]) -> None:
    directory, outcomes = finished
    assert outcomes["converted"].exit_code == 0, outcomes["converted"].stderr
    assert outcomes["converted"].stderr == ""
    expected = adapter_parameters(adapted_model())
    loaded = adapter_parameters(load_adapter(tiny_model(), directory / "converted"))
    assert all(torch.equal(loaded[name], parameter) for name, parameter in expected.items())


@pytest.mark.parametrize("name", ["merged", "merged_moved"])
def test_the_merged_model_loads_in_transformers(
    finished: tuple[Path, dict[str, Finished]], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    directory, outcomes = finished
    assert outcomes[name].exit_code == 0, outcomes[name].stderr
    assert outcomes[name].stdout.startswith(f"{name}: 6 weights merged")
    merged = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
    adapted = load_adapter(tiny_model(), directory / "lora")
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() <= LOGITS_TOLERANCE
        assert (merged(ids).logits - tiny_model()(ids).logits).abs().max() > 0.01
