"""Which dtype a machine computes in, from its properties; and what several of them compute in together."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssmlora_dist import precision
from ssmlora_dist.precision import common_dtype, cpu_flags, machine_dtype, suitable_dtype

AVX2 = frozenset({"avx", "avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512_vnni"}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), "float16"),  # V100
        ((7, 5), "float16"),  # T4
        ((8, 0), "bfloat16"),  # A100
        ((8, 9), "bfloat16"),  # L40S
        ((9, 0), "bfloat16"),  # H100
        ((12, 0), "bfloat16"),
    ],
)
def test_of_gpus(capability: tuple[int, int], expected: str) -> None:
    assert suitable_dtype("cuda", capability=capability) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (frozenset(), "float32"),
        (AVX2, "float32"),
        (AVX512, "float32"),
        (AVX512 | {"avx512_bf16"}, "bfloat16"),
        (AVX512 | {"amx_tile", "amx_bf16"}, "bfloat16"),
        (AVX512 | {"amx_tile", "amx_int8"}, "float32"),
    ],
)
def test_of_cpus(flags: frozenset[str], expected: str) -> None:
    assert suitable_dtype("cpu", cpu_flags=flags) == expected


def test_a_gpu_s_host_does_not_count() -> None:
    assert suitable_dtype("cuda", capability=(7, 0), cpu_flags=AVX512 | {"avx512_bf16"}) == "float16"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bfloat16", "bfloat16"], "bfloat16"),
        (["bfloat16", "float16"], "float16"),
        (["float32", "bfloat16"], "float32"),
        (["float16", "float32", "bfloat16"], "float32"),
    ],
)
def test_machines_that_differ_compute_in_what_all_can_do(names: list[str], expected: str) -> None:
    assert common_dtype(names) == expected  # type: ignore[arg-type]


def test_the_flags_are_read_from_linux(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    # Two cores; `vmx flags` is another line of the same file.
    core = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16\nvmx flags\t: ept\n\n"
    cpuinfo.write_text(core * 2)
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "avx512_bf16"}
    # Of a CPU that is no x86.
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu_flags(cpuinfo) == frozenset()
    assert cpu_flags(tmp_path / "missing") == frozenset()


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: AVX2)
    assert machine_dtype("cpu") == "float32"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    assert machine_dtype("cuda") == "float16"
