"""Which device a process takes, and that it does not take the CPU because a GPU's driver is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmlora_dist import devices
from ssmlora_dist.devices import ALLOCATOR_VARIABLES, device_type
from ssmlora_dist.errors import ConfigError

LAUNCH = Path(__file__).parents[1] / "launch"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture
def build_for_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A build of torch for CUDA that finds no GPU, on a machine without one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(devices, "PCI_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refuse(monkeypatch, NO_DRIVER)
    return monkeypatch


def refuse(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr("torch.cuda.init", init)


def add_pci_device(directory: Path, vendor: str, kind: str) -> None:
    device = directory / f"0000:{len(list(directory.iterdir())):02}:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


def test_a_driver_that_torch_cannot_use_is_an_error_with_torch_s_reason(
    build_for_cuda: pytest.MonkeyPatch,
) -> None:
    refuse(build_for_cuda, TOO_OLD)
    with pytest.raises(ConfigError, match=r"driver on your system is too old.*CUDA_VISIBLE_DEVICES=\"\""):
        device_type()


@pytest.mark.parametrize("asked", ["", "-1"])
def test_the_cpu_is_taken_when_it_is_asked_for(build_for_cuda: pytest.MonkeyPatch, asked: str) -> None:
    refuse(build_for_cuda, TOO_OLD)
    build_for_cuda.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert device_type() == "cpu"


def test_a_machine_without_a_gpu_needs_no_driver(build_for_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert device_type() == "cpu"
    refuse(build_for_cuda, "No CUDA GPUs are available")
    assert device_type() == "cpu"
    # Another maker's GPU, and a network card.
    add_pci_device(tmp_path, "0x8086", "0x030000")
    add_pci_device(tmp_path, "0x10de", "0x020700")
    assert device_type() == "cpu"


def test_a_gpu_without_a_driver_or_a_container_without_its_gpus_is_an_error(
    build_for_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_pci_device(tmp_path, "0x10de", "0x030200")
    with pytest.raises(ConfigError, match=NO_DRIVER):
        device_type()


def test_a_build_for_the_cpu_is_one(build_for_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_pci_device(tmp_path, "0x10de", "0x030200")
    build_for_cuda.setattr("torch.version.cuda", None)
    assert device_type() == "cpu"
    build_for_cuda.setattr("torch.cuda.is_available", lambda: True)
    assert device_type() == "cuda"


@pytest.mark.parametrize("script", ["train", "evaluate", "generate", "harness", "sweep"])
def test_every_script_asks_here(script: str) -> None:
    text = (LAUNCH / f"{script}.py").read_text()
    assert "device_type()" in text
    assert "is_available" not in text


@pytest.mark.parametrize("given", [None, *ALLOCATOR_VARIABLES])
def test_the_allocator_grows_its_segments_unless_the_user_has_set_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    for variable in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    device_type()
    found = {variable: os.environ[variable] for variable in ALLOCATOR_VARIABLES if variable in os.environ}
    grown = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert found == ({given: "max_split_size_mb:64"} if given else grown)


def test_torch_has_not_read_the_allocator_s_settings_before() -> None:
    code = (
        "import torch\n"
        "from ssmlora_dist.devices import device_type\n"
        "device_type()\n"
        "print(torch._C._accelerator_getAllocatorSettings())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "expandable_segments:True\n", done.stderr
