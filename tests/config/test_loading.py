from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config import loading
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.errors import ConfigError

from .conftest import Change, Load, Problems, changed


def test_sections_that_are_left_out_take_their_defaults(load: Load) -> None:
    config = load()
    assert config.run.output_dir == Path("runs")
    assert config.quantization.mode == "nf4"
    assert config.adapter.alternate == ("q_proj", "v_proj")
    assert config.deepspeed == {}


def test_a_whole_number_may_stand_for_a_fraction(load: Load) -> None:
    assert load(("adapter.alpha", 4)).adapter.alpha == 4.0


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("training.max_steps=7", lambda config: config.training.max_steps, 7),
        ("training.learning_rate=1e-3", lambda config: config.training.learning_rate, 1e-3),
        ("parallel.offload_optimizer=false", lambda config: config.parallel.offload_optimizer, False),
        ("run.output_dir=/data/runs", lambda config: config.run.output_dir, Path("/data/runs")),
        ("run.name=other", lambda config: config.run.name, "other"),
        ('run.name="7"', lambda config: config.run.name, "7"),
        ("data.validation=null", lambda config: config.data.validation, None),
        ('adapter.alternate=["k_proj"]', lambda config: config.adapter.alternate, ("k_proj",)),
        ("model.config.hidden_size=32", lambda config: config.model.config["hidden_size"], 32),
        ("deepspeed.aio.block_size=1", lambda config: config.deepspeed, {"aio": {"block_size": 1}}),
        ("tracking.uri=sqlite:///a=b.db", lambda config: config.tracking.uri, "sqlite:///a=b.db"),
    ],
)
def test_overrides(load: Load, override: str, read: Callable[[Any], Any], expected: object) -> None:
    assert read(load(overrides=[override])) == expected


def test_the_last_override_of_a_field_counts(load: Load) -> None:
    assert load(overrides=["run.seed=1", "run.seed=2"]).run.seed == 2


def test_an_override_mends_what_the_file_has_wrong(load: Load) -> None:
    assert load(("training.max_steps", "x"), overrides=["training.max_steps=5"]).training.max_steps == 5


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        (
            "training.learning_rte=1",
            ("training.learning_rte: unknown key", "did you mean training.learning_rate?"),
        ),
        ("modle.path=x", ("modle: unknown key", "did you mean model?")),
        ("training.max_steps", ("--set training.max_steps:", "section.key=value")),
        ("=5", ("--set =5:", "section.key=value")),
        ("training..max_steps=5", ("--set training..max_steps=5:", "section.key=value")),
        ("run.name.first=a", ('--set run.name.first=a: run.name is "test"', "--set run.name=VALUE")),
        (
            "data.train.task.lengths.0=512",
            ("lengths is [512]", "--set data.train.task.lengths=VALUE"),
        ),
        ("run.seed=NaN", ('run.seed: "NaN" given', "a whole number")),
        ("adapter.alpha=1e999", ("adapter.alpha: Infinity given", "the default is 16.0")),
        ("run.output_dir=5", ("run.output_dir: 5 given", 'write it in quotes: "5"')),
        ("run.name=7", ("run.name: 7 given", 'write it in quotes: "7"')),
    ],
)
def test_overrides_that_cannot_be(problems: Problems, override: str, fragments: tuple[str, ...]) -> None:
    lines = problems(overrides=[override])
    assert len(lines) == 1
    assert all(fragment in lines[0] for fragment in fragments), lines[0]


def test_the_launcher_says_how_many_ranks(
    write: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(changed(("training.global_batch_size", 6)))
    launch = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="WORLD_SIZE: given without RANK"):
        load_config(path)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert load_config(path).training.global_batch_size == 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="micro_batch_size 2 and 2 ranks"):
        load_config(path)


def test_a_source_may_be_files_by_name_and_glob(load: Load, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b1.jsonl", "b2.jsonl"):
        (tmp_path / name).write_text("{}\n")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b*.jsonl")]
    source = load(("data.train", {"format": "instruction", "path": paths})).data.train
    assert source.path == tuple(paths)


def test_files_are_looked_for_only_when_asked(load: Load) -> None:
    changes = [("data.train", {"format": "text", "path": "nowhere.txt"}), ("model", {"path": "./nowhere"})]
    assert load(*changes, check_files=False).model.path == "./nowhere"


@pytest.mark.parametrize("name", ["org/model", "model"])
def test_a_hub_name_is_not_looked_for_among_the_files(load: Load, name: str) -> None:
    assert load(("model", {"path": name})).model.path == name


def test_a_name_in_an_existing_directory_is_a_path(
    problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "SmolLM").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    lines = problems(("model", {"path": "models/SmolLN"}))
    assert len(lines) == 1
    assert "did you mean models/SmolLM?" in lines[0]


@pytest.mark.parametrize(("native", "fits"), [("bfloat16", True), ("float32", False)])
def test_what_the_machine_computes_in_is_judged_where_auto_is_given(
    load: Load, native: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "machine_dtype", lambda device_type: native)
    changes: list[Change] = [
        ("model.compute_dtype", "auto"),
        ("adapter.state_dtype", "bfloat16"),
        ("parallel.pipeline_stages", 2),
    ]
    # Nothing is known of where it is to run.
    assert load(*changes, world_size=2).model.compute_dtype == "auto"
    if fits:
        # The ranks and a checkpoint have a say in it.
        assert load(*changes, world_size=2, device_type="cpu").model.compute_dtype == "auto"
        return
    with pytest.raises(ConfigError) as refused:
        load(*changes, world_size=2, device_type="cpu")
    assert 'adapter.state_dtype: "bfloat16" given with compute_dtype "float32"' in str(refused.value)


OWN_FORM = """
from dataclasses import dataclass
from typing import ClassVar
from ssmlora_dist import Form, register_form

@register_form
@dataclass(frozen=True, kw_only=True)
class Filed(Form):
    name: ClassVar[str] = "from_a_file"

    def step(self, z, state, parameters, drop):
        return z, state
"""


def test_a_form_is_registered_by_the_file_that_is_named(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN_FORM)
    for _ in range(2):
        config = load(("adapter.method", "from_a_file"), ("adapter.form_module", str(file)))
        assert config.adapter.form("from_a_file").name == "from_a_file"


def test_a_form_that_is_not_known_or_cannot_be_imported_is_a_problem_of_its_key(problems: Problems) -> None:
    [line] = problems(("adapter.method", "gatd"))
    assert line.startswith('adapter.method: "gatd" given; allowed: constant, ')
    assert 'did you mean "gated"' in line
    missing = ("adapter.form_module", "nowhere/forms.py")
    [line] = problems(missing, ("adapter.method", "mine"), ("adapter.form_settings", {"depth": 2}))
    assert line.startswith('adapter.form_module: "nowhere/forms.py" given, which cannot be imported')
    [line] = problems(("adapter.method", "lora"), ("adapter.carry", "raw"))
    assert line.startswith("adapter: `carry` 'raw' given, which \"lora\" does not read; leave it out")
