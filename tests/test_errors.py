from __future__ import annotations

import pickle

import pytest

from ssmlora_dist.errors import CheckpointError, ConfigError, SSMLoRAError, TrainingError

PROBLEMS = ["adapter.rank: 8 given, 4 in the checkpoint", "model.init: missing"]


@pytest.mark.parametrize(
    "error",
    [ConfigError(PROBLEMS, source="--resume runs/a"), TrainingError("step 3"), CheckpointError("gone")],
)
def test_an_error_says_the_same_on_the_rank_it_is_sent_to(error: SSMLoRAError) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert vars(received) == vars(error)
    assert received.exit_code == error.exit_code
