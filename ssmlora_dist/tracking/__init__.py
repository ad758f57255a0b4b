"""Run records: experiment trackers, the run directory, the environment, the console and plots."""

from __future__ import annotations

from ssmlora_dist.tracking.console import BeforeAfter, Console
from ssmlora_dist.tracking.curves import plot_curves
from ssmlora_dist.tracking.environment import environment_record
from ssmlora_dist.tracking.mlflow import mlflow_tracker
from ssmlora_dist.tracking.mlflow_store import check_store, is_installed
from ssmlora_dist.tracking.protocol import NullTracker, RunStatus, Tracker, flat_parameters
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.run_directory import RunDirectory
from ssmlora_dist.tracking.store import Store, choose_store

__all__ = [
    "BeforeAfter",
    "Console",
    "NullTracker",
    "RunDirectory",
    "RunStatus",
    "Store",
    "Tracker",
    "check_store",
    "choose_store",
    "environment_record",
    "flat_parameters",
    "is_installed",
    "mlflow_tracker",
    "plot_curves",
    "quiet_libraries",
]
