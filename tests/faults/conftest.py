from tests.stages.conftest import adapted, files, full, run_stage, trained  # noqa: F401 - fixtures
