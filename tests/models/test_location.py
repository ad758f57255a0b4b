"""Finding a model: directories, and every answer the hub may give (it is never asked)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.location import locate


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Puts an answer, or an exception, in the place of the hub; returns the list of calls."""

    def answer(result: Path | Exception) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def download(name: str, **options: Any) -> str:
            calls.append({"name": name, **options})
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        return calls

    return answer


def hub_error(name: str) -> Exception:
    """An error of huggingface_hub, made without the HTTP response that its constructor asks for."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error: Exception = kind.__new__(kind)
    error.args = ("first line\nsecond line",)
    return error


def test_a_directory_is_taken_as_it_is(tmp_path: Path, hub: Callable[..., Any]) -> None:
    calls = hub(AssertionError("the hub was asked"))
    assert locate(str(tmp_path), weights=True) == tmp_path
    assert calls == []


def test_a_hub_name_is_downloaded_without_pickle(tmp_path: Path, hub: Callable[..., Any]) -> None:
    calls = hub(tmp_path)
    assert locate("someone/some-model", "v2", weights=True) == tmp_path
    assert locate("someone/some-model", weights=False) == tmp_path
    assert [(call["name"], call["revision"]) for call in calls] == [
        ("someone/some-model", "v2"),
        ("someone/some-model", None),
    ]
    with_weights, without = (call["allow_patterns"] for call in calls)
    assert "model*.safetensors" in with_weights
    assert not any("safetensors" in pattern for pattern in without)
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in without[:-1])


@pytest.mark.parametrize("path", ["/no/such/place", "./nowhere", "~nobody", "a/b/c"])
def test_a_path_that_can_be_no_hub_name(path: str, hub: Callable[..., Any]) -> None:
    calls = hub(AssertionError("the hub was asked"))
    with pytest.raises(ModelError, match=r"model\.path: there is no directory"):
        locate(path, weights=True)
    assert calls == []


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file; name the directory"):
        locate(str(file), weights=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", r"granted access.*`hf auth login`.*local directory"),
        ("RepositoryNotFoundError", r"neither a directory here nor a model on the hub.*`hf auth login`"),
        ("RevisionNotFoundError", r"^model\.revision: .*no revision 'v2'"),
        ("HFValidationError", "nor a possible name on the hub"),
        (
            "LocalEntryNotFoundError",
            r"could not be fetched .*LocalEntryNotFoundError: first line\); check the",
        ),
        ("OfflineModeIsEnabled", r"could not be fetched .*local directory"),
        ("HfHubHTTPError", r"could not be fetched .*local directory"),
    ],
)
def test_every_failure_of_the_hub_is_one_clear_line(
    error: str, message: str, hub: Callable[..., Any]
) -> None:
    hub(hub_error(error))
    with pytest.raises(ModelError, match=message) as caught:
        locate("someone/some-model", "v2", weights=True, where="model.path")
    assert "someone/some-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_setting_that_named_the_model_is_named(hub: Callable[..., Any]) -> None:
    hub(hub_error("RepositoryNotFoundError"))
    with pytest.raises(ModelError, match=r"^model\.tokenizer: "):
        locate("someone/some-model", weights=False, where="model.tokenizer")
