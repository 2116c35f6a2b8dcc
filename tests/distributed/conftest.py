from tests.stages.conftest import files, run_stage  # noqa: F401 - fixtures
