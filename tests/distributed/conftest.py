from tests.stages.conftest import adapted, files, full, run_stage  # noqa: F401 - fixtures
