"""DeepSpeed on the first of several ranks that are not there, on CUDA that is pretended (`fake_cuda`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist


@contextmanager
def pretended_ranks(number: int) -> Iterator[None]:
    """Within, this process is rank 0 of `number`: collectives move nothing. DeepSpeed computes on CUDA."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from deepspeed.utils import groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = get_accelerator(), sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        with ExitStack() as stack:
            for target, name in (
                (CUDA_Accelerator, "range_push"),
                (CUDA_Accelerator, "range_pop"),
                # It compares numbers that nobody has sent.
                (partitioned_param_coordinator, "assert_ints_same_as_other_ranks"),
            ):
                stack.enter_context(mock.patch.object(target, name))
            environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(number)}
            stack.enter_context(mock.patch.dict(os.environ, environment))
            set_accelerator(CUDA_Accelerator())
            deepspeed.init_distributed("nccl", dist_init_required=False, verbose=False)
            yield
    finally:
        accelerator, sys.excepthook = before
        set_accelerator(accelerator)
        dist.destroy_process_group()
        comm.cdb = groups._WORLD_GROUP = None
