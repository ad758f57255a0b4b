"""The forms of the state by name: those in the folders beside this file, and those of users."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from ssmlora_dist import ops
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops.form import Form

_forms: dict[str, type[Form]] = {}


def register_form(form: type[Form]) -> type[Form]:
    """Makes a form known by its `name`, for `AdapterConfig.method`; returns it, so it can be a decorator.

    Raises:
        AdapterError: it lacks `name` or `step`, or the name is another form's.
    """
    lacking = [name for name in ("name", "step") if getattr(form, name, None) is getattr(Form, name, None)]
    if lacking:
        raise AdapterError(
            f"register_form: {form.__module__}.{form.__qualname__} defines no `{lacking[0]}`; a form has a "
            "`name` and a `step` of its own"
        )
    if (known := _forms.setdefault(form.name, form)) is not form:
        raise AdapterError(
            f"register_form: {form.name!r} is the name of {known.__module__}.{known.__qualname__}; give "
            f"{form.__module__}.{form.__qualname__} another `name`"
        )
    return form


def form_names() -> list[str]:
    """The names of all forms, sorted."""
    _import_own()
    return sorted(_forms)


def form_named(name: str) -> type[Form]:
    """The form of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    names = form_names()
    if name not in names:
        near = difflib.get_close_matches(name.casefold(), names, n=1)
        remedy = f'did you mean "{near[0]}"?' if near else "choose one of these"
        raise ValueError(
            f'"{name}" given; allowed: {", ".join(names)}; {remedy} (a form of your '
            "own has to be registered first, in a run by the file that adapter.form_module names)"
        )
    return _forms[name]


def import_forms(module: str) -> None:
    """Imports what registers forms: a Python file (`forms/mine.py`) or a module (`package.forms`).

    Raises:
        AdapterError: it cannot be imported.
    """
    try:
        if module.endswith(".py"):
            _import_file(Path(module).expanduser().resolve())
        else:
            importlib.import_module(module)
    except Exception as error:  # whatever a user's file raises
        raise AdapterError(
            f'"{module}" given, which cannot be imported ({type(error).__name__}: {error}); name a Python '
            "file that is there, with its ending .py, or an installed module, and mend what it raises"
        ) from error


def _import_file(path: Path) -> ModuleType:
    """The module of a file; one that is imported already, under whatever name, is not imported again."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    name = f"ssmlora_form_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def _import_own() -> None:
    for folder in pkgutil.iter_modules(ops.__path__):
        if folder.ispkg:
            importlib.import_module(f"{ops.__name__}.{folder.name}")
