"""Merges a plain LoRA into its base model: `python launch/merge.py --adapter DIR --out DIR`.

The merged model computes in full precision what the adapter computes on the full-precision base model; an
adapter that was trained on a quantised one meets weights that are not rounded as those were.
"""

from __future__ import annotations

import sys

from ssmlora_dist.config.arguments import ArgumentParser, run_command
from ssmlora_dist.config.paths import name_argument, path_argument
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = ArgumentParser(description="Merge a plain LoRA into the weights of its base model.")
    parser.add_argument(
        "--adapter",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="adapter directory of a run, or PEFT's LoRA",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="directory of the new model; must not exist",
    )
    parser.add_argument(
        "--model",
        type=name_argument,
        metavar="PATH",
        help="the base model, where it is not where it was in training",
    )
    arguments = parser.parse_args()
    quiet_libraries()

    from ssmlora_dist.adapters.files import read_base
    from ssmlora_dist.models.merging import merge_adapter

    count = merge_adapter(arguments.adapter, arguments.out, arguments.model)
    if texts := read_base(arguments.adapter).get("stop_texts"):
        said = " or ".join(map(repr, texts))
        print(f"its answers end with {said}, which is no token: tell it those who generate (`stop_strings`)")
    print(f"{arguments.out}: {count} weights merged; load it with AutoModelForCausalLM.from_pretrained")


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
