"""Settings that only concern memory may differ between the attempts of a run; all others may not."""

from __future__ import annotations

import pytest

from rlhf.config.memory_settings import MEMORY_SETTINGS, memory_changes, only_memory_differs
from rlhf.config.schema import STAGES, EvaluateConfig, PPOConfig, SFTConfig

VALUES = {"optim": {"microbatch_size": 4, "batch_size": 8}, "offload": [], "sampling": {"batch_size": 64}, "seed": 1}


@pytest.mark.parametrize("key", MEMORY_SETTINGS)
def test_each_setting_exists_in_a_stage_that_trains_or_generates(key: str) -> None:
    section, _, name = key.rpartition(".")
    schemas = (SFTConfig, PPOConfig, EvaluateConfig)
    assert set(schemas) <= set(STAGES.values())
    sections = [schema.model_fields.get(section) for schema in schemas] if section else []
    known = [set(field.annotation.model_fields) for field in sections if field is not None]
    assert any(name in names for names in known) or name in PPOConfig.model_fields


def test_a_changed_memory_setting_is_listed_and_accepted() -> None:
    given = VALUES | {"optim": {"microbatch_size": 1, "batch_size": 8}, "offload": ["reward"]}
    assert only_memory_differs(VALUES, given)
    assert memory_changes(VALUES, given) == {"optim.microbatch_size": [4, 1], "offload": [[], ["reward"]]}
    assert memory_changes(VALUES, VALUES) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"optim": {"microbatch_size": 4, "batch_size": 4}},
        {"batch_size": 64},
        {"sampling": {"batch_size": 64, "top_k": 5}},
    ],
)
def test_any_other_difference_is_refused(change: dict[str, object]) -> None:
    assert not only_memory_differs(VALUES, VALUES | change)
