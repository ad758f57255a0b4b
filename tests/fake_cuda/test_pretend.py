"""A device that is not there: what it refuses, what it lets pass, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ssmlora_dist.fake_cuda import pretend
from ssmlora_dist.fake_cuda.pretend import FakeCudaError, pretended_cuda
from ssmlora_dist.fake_cuda.watch import STEP, Watch
from tests.fake_cuda.cases import needs_compiler

pytestmark = needs_compiler


def test_autograd_runs_on_cuda_tensors_after_real_ones() -> None:
    real = torch.ones(3, requires_grad=True)
    (real * 2).sum().backward()
    for _ in range(2):
        with pretended_cuda(), FakeTensorMode():
            weight = torch.ones(4, 3, device="cuda", requires_grad=True)
            F.silu(F.linear(torch.ones(5, 3, device="cuda"), weight)).sum().backward()
        assert weight.grad is not None
        assert weight.grad.device == torch.device("cuda", 0)
    (real * 2).sum().backward()
    assert real.grad is not None
    assert real.grad.tolist() == [4, 4, 4]


def test_nothing_of_it_stays() -> None:
    names = [(target, name) for target, name, _ in pretend._answers()]
    before = [getattr(target, name) for target, name in names]
    with pretended_cuda():
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
        assert torch.cuda.get_device_capability() == pretend.CAPABILITY
    assert torch.accelerator.current_accelerator() is None
    assert [getattr(target, name) for target, name in names] == before


def test_a_mix_of_devices_raises() -> None:
    with pretended_cuda(), FakeTensorMode(), pytest.raises(Exception, match="two devices, cuda:0 and cpu"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_without_a_compiler_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    pretend._guard.cache_clear()
    with pytest.raises(FakeCudaError, match=r"g\+\+, which is not installed"), pretended_cuda():
        pass
    pretend._guard.cache_clear()


def test_the_attention_of_a_gpu_is_taken() -> None:
    query = (1, 4, 16, 8)
    with pretended_cuda(), FakeTensorMode(), Watch("cuda") as watch:
        half, single = (torch.ones(query, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32))
        mask = torch.ones(16, 16, device="cuda", dtype=torch.bool)
        for each, masked in ((half, None), (single, None), (half, mask)):
            out = F.scaled_dot_product_attention(each, each, each, masked)
            assert out.shape == query
    names = [name for _, name in watch.launches if "attention" in name]
    assert names == ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"]
    assert sum(n for (_, name), n in watch.launches.items() if "efficient_attention" in name) == 2


WAITING = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "copy to the host": lambda x: x.cpu(),
    "copy from the host": lambda x: torch.ones(3).to(x.device),
    "synchronize": lambda _: torch.cuda.synchronize(),
}
PASSING = {
    "a pinned upload": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "a copy to pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    "arithmetic": lambda x: (x * 2).sum(),
}


@pytest.mark.parametrize("what", [*WAITING, *PASSING])
def test_where_the_host_waits_is_noted(what: str) -> None:
    with pretended_cuda(), FakeTensorMode(), Watch("cuda") as watch, watch.during(STEP):
        x = torch.ones(3, device="cuda")
        (WAITING | PASSING)[what](x)
    assert [(sync.phase, sync.what, sync.times) for sync in watch.syncs] == (
        [(STEP, what, 1)] if what in WAITING else []
    )


def test_not_pinned_is_waited_for_whatever_is_asked() -> None:
    with pretended_cuda(), FakeTensorMode(), Watch("cuda") as watch:
        torch.ones(3).to("cuda", non_blocking=True)
    assert [sync.what for sync in watch.syncs] == ["copy from the host"]
