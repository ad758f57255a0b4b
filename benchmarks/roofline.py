"""The physical limit of training, by model and length: `python benchmarks/roofline.py --model llama2-7b`.

The ceilings are those of one H100 (SXM) unless given; `--measure` takes those of this machine's device. They
are what a device reaches, not what its data sheet says.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ssmlora_dist.devices import device_type
from ssmlora_dist.distributed.cost_model import bytes_per_weight
from ssmlora_dist.distributed.roofline import Ceilings, measured_ceilings, step_limit
from ssmlora_dist.models import empty_model, load_config, structure_of
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.precision import machine_dtype

H100 = Ceilings(matmul_tflops=790.0, attention_tflops=550.0, bandwidth_gb_per_second=2800.0)
LENGTHS = (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="lengths of one sequence")
    parser.add_argument("--measure", action="store_true", help="measure the ceilings of this machine")
    for name in Ceilings.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(H100, name))
    arguments = parser.parse_args()
    ceilings = Ceilings(**{name: getattr(arguments, name) for name in Ceilings.__dataclass_fields__})
    dtype = torch.bfloat16
    if arguments.measure:
        device = torch.device(device_type())
        dtype = getattr(torch, machine_dtype(device.type))
        ceilings = measured_ceilings(device, dtype)
    print(
        f"{arguments.model}, NF4, {dtype}, checkpointing; {ceilings.matmul_tflops:.3g} TFLOP/s of products, "
        f"{ceilings.attention_tflops:.3g} of attention, {ceilings.bandwidth_gb_per_second:.4g} GB/s"
    )
    print("  tokens  products  attention  dequantise    tokens/s at most")
    nf4 = bytes_per_weight("nf4", double_quantization=True, compute_dtype_bytes=dtype.itemsize)
    shape = structure_of(empty_model(load_config(config=SHAPES[arguments.model]))).shape
    for length in arguments.tokens:
        limit = step_limit(
            shape,
            ceilings,
            sequence_length=length,
            bytes_per_linear_weight=nf4,
            compute_dtype_bytes=dtype.itemsize,
        )
        shares = (limit.matmul_seconds, limit.attention_seconds, limit.dequantization_seconds)
        products, attention, dequantise = (f"{share / limit.seconds:.1%}" for share in shares)
        print(
            f"{length:8}  {products:>8}  {attention:>9}  {dequantise:>10}  {limit.tokens_per_second:18,.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
