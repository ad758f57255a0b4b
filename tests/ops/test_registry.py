"""The registry of forms: what is in it, what is refused, and files that register forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ssmlora_dist import Form, register_form
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops import registry
from ssmlora_dist.ops.registry import form_named, form_names, import_forms

STEP = """
    def step(self, z, state, parameters, drop):
        return z, state
"""
FILE = (
    """
from dataclasses import dataclass
from typing import Any, ClassVar
from ssmlora_dist import Form, register_form


@register_form
@dataclass(frozen=True, kw_only=True)
class Filed(Form):
    name: ClassVar[str] = "filed"
"""
    + STEP
)


@pytest.fixture(autouse=True)
def own_forms_alone() -> Iterator[None]:
    form_names()
    before = dict(registry._forms)
    yield
    registry._forms.clear()
    registry._forms.update(before)


@dataclass(frozen=True, kw_only=True)
class Mine(Form):
    name: ClassVar[str] = "mine"

    def step(self, z: Any, state: Any, parameters: Any, drop: Any) -> Any:
        return z, state


def test_every_folder_is_a_form_with_a_reference() -> None:
    folders = [path for path in Path(registry.__file__).parent.iterdir() if (path / "__init__.py").exists()]
    assert {"lora", "ssmlora"} <= {folder.name for folder in folders} <= set(form_names())
    for folder in folders:
        assert form_named(folder.name).name == folder.name
        assert (folder / "reference.py").exists(), folder


def test_a_form_is_found_by_its_name_and_may_be_registered_again() -> None:
    assert register_form(Mine) is Mine
    register_form(Mine)
    assert form_named("mine") is Mine


def test_a_form_without_a_name_or_a_step_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"defines no `name`; a form has a `name` and a `step`"):
        register_form(type("Nameless", (Form,), {"step": Mine.step}))
    with pytest.raises(AdapterError, match=r"Stepless defines no `step`"):
        register_form(type("Stepless", (Form,), {"name": "stepless"}))
    assert "stepless" not in form_names()


def test_a_name_that_is_taken_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Mine):
        name: ClassVar[str] = "gated"

    with pytest.raises(
        AdapterError, match=r"'gated' is the name of ssmlora_dist.ops.gated.Gated; give .*Other"
    ):
        register_form(Other)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'"gatd" given; allowed: .*gated, .*lora.*did you mean "gated"'):
        form_named("gatd")


def test_a_file_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forms.py").write_text(FILE)
    import_forms(str(tmp_path / "forms.py"))
    first = form_named("filed")
    monkeypatch.chdir(tmp_path)
    import_forms("forms.py")
    assert form_named("filed") is first


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("nowhere/forms.py", "FileNotFoundError"),
        ("no_such_package.forms", "ModuleNotFoundError"),
        ("broken.py", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    module: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0")
    with pytest.raises(
        AdapterError, match=f'"{module}" given, which cannot be imported .{says}.*name a Python'
    ):
        import_forms(module)
