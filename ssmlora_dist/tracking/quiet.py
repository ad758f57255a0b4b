"""Keeps the chatter of other libraries off the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error"]

_LOGGERS = (
    "DeepSpeed",
    "transformers",
    "datasets",
    "huggingface_hub",
    "bitsandbytes",
    "accelerate",
    "mlflow",
    "alembic",
    "urllib3",
    "httpx",
    "filelock",
    "matplotlib",
    "torch.distributed",
)
_NOISY_MODULES = (
    r"(torch|deepspeed|transformers|datasets|huggingface_hub|bitsandbytes|accelerate|mlflow)(\.|$)"
)


class _MinimumLevel(logging.Filter):
    """Drops records below a level, whatever level the library gives its logger when it is imported."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.level


def quiet_libraries(level: LogLevel = "warning", is_main_rank: bool = True) -> None:
    """Silences DeepSpeed, transformers and the others, unless `level` is `info` or `debug`.

    Imports none of them: what a library reads from the environment is set there before its import, the rest
    is set on loggers by name. To be called before they are imported and once more afterwards: only then can
    DeepSpeed be made to say more than it does by itself, and transformers' progress bars be turned off.
    Variables that the user has set stay as they are.

    Args:
        level: of the run's own messages; at `warning` and `error` only the libraries' errors are shown.
        is_main_rank: the other ranks show no bars of downloads either.
    """
    is_open = level in ("info", "debug")
    library_level = level.upper() if is_open else "ERROR"
    for variable in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, library_level.lower())
    # MLflow logs the traceback of a failed request as an error; the tracker reports it in one line.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", library_level if is_open else "CRITICAL")
    _set_log_levels(logging.getLevelNamesMapping()[library_level], is_open)
    if is_open:
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not is_main_rank:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _turn_off_progress_bars(is_main_rank)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=_NOISY_MODULES)


def _turn_off_progress_bars(is_main_rank: bool) -> None:
    """Turns off the bars of libraries that are imported already; those of downloads stay on the main rank."""
    if "datasets.utils.tqdm" in sys.modules and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["datasets.utils.tqdm"].disable_progress_bars()
    if "transformers.utils.logging" in sys.modules:
        # It turns off the hub's bars as well, and a download of many gigabytes must not look like a hang.
        sys.modules["transformers.utils.logging"].disable_progress_bar()
        if is_main_rank and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            sys.modules["huggingface_hub.utils"].enable_progress_bars()


def _set_log_levels(level: int, is_open: bool) -> None:
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        for earlier in [item for item in logger.filters if isinstance(item, _MinimumLevel)]:
            logger.removeFilter(earlier)
        if is_open:
            for handler in logger.handlers:
                handler.setLevel(level)
        else:
            logger.addFilter(_MinimumLevel(level))
