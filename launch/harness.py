"""The standard harness on an adapted model: `python launch/harness.py --adapter DIR --tasks boolq`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

# lm-eval's bars, which are drawn in logs too: there now and then. Read when tqdm is loaded.
if sys.stderr is not None and not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")

from ssmlora_dist.config.arguments import build_adapter_parser, run_command
from ssmlora_dist.config.paths import name_argument, path_argument
from ssmlora_dist.devices import device_type
from ssmlora_dist.durable import explained, write_text
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress
from ssmlora_dist.records import nearest_name
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = build_adapter_parser("Evaluate an adapted model with lm-eval.")
    add = parser.add_argument
    add("--tasks", required=True, nargs="+", metavar="NAME", help="lm-eval's names")
    add(
        "--include-path", type=name_argument, metavar="DIR", help="directory of further task files of lm-eval"
    )
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples before the question; by default the task's",
    )
    add("--limit", type=int, metavar="N", help="items of each task at most")
    add("--batch-size", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add("--out", type=path_argument, metavar="FILE", help="where results go as JSON, beside the table")
    arguments = parser.parse_args()
    _check(arguments)
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError("lm-eval is not installed: pip install -c constraints.txt 'lm-eval[hf]'")
    quiet_libraries()

    with progress("loading lm-eval and its tasks"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        known = TaskManager(include_path=arguments.include_path)

    from ssmlora_dist.config.build import load_trained
    from ssmlora_dist.models import max_positions
    from ssmlora_dist.tracking import Console

    unknown = [name for name in arguments.tasks if name not in known.all_tasks]
    if unknown:
        nearest = nearest_name(unknown[0], known.all_tasks)
        raise DataError(
            f"--tasks {unknown[0]}: lm-eval has no such task{nearest}; `lm_eval ls tasks` lists them"
        )
    console = Console(enabled=True)
    device = device_type()
    model, tokenizer = load_trained(
        arguments.adapter,
        path=arguments.model,
        quantization=arguments.quantization,
        dtype=arguments.dtype,
        form_module=arguments.form_module,
        device=device,
        warn=console.warn,
    )
    if texts := model.generation_config.stop_strings:
        # The harness has no place for them: `generate` would need the tokenizer.
        model.generation_config.stop_strings = None
        said = " or ".join(map(repr, texts))
        console.warn(f"answers end with {said}, which is no token: the harness reads on")
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        max_length=max_positions(model.config),
    )
    results = simple_evaluate(
        harness,
        tasks=arguments.tasks,
        task_manager=known,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
    )
    print(make_table(results))
    if arguments.out is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        with explained(arguments.out, "choose another --out"):
            write_text(arguments.out, text + "\n")


def _check(arguments: Namespace) -> None:
    """Before hours of work, not after them."""
    for option, value, least in (
        ("--num-fewshot", arguments.num_fewshot, 0),
        ("--limit", arguments.limit, 1),
        ("--batch-size", arguments.batch_size, 1),
    ):
        if value is not None and value < least:
            raise DataError(f"{option} {value}: allowed: {least} or more; give that, or leave it out")
    for option, path in (("--adapter", arguments.adapter), ("--include-path", arguments.include_path)):
        if path is not None and not Path(path).is_dir():
            raise DataError(f"{option} {path}: no such directory; name one that is there")
    if arguments.out is not None:
        if arguments.out.is_dir():
            raise DataError(f"--out {arguments.out}: is a directory; name a file in it")
        with explained(arguments.out, "choose another --out"):
            arguments.out.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
