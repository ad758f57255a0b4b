"""Figures that are drawn in a test, to be looked into."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def noted_figures(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[list[Any]]:
    """The figures that `modules` make by their `new_figure`; a warning of the library is an error."""
    made: list[Any] = []
    make = modules[0].new_figure

    def noted(size: tuple[float, float]) -> tuple[Any, Any]:
        figure, canvas = make(size)
        made.append(figure)
        return figure, canvas

    for module in modules:
        monkeypatch.setattr(module, "new_figure", noted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of files that other tests left open, whenever they are collected.
        warnings.simplefilter("ignore", ResourceWarning)
        yield made
