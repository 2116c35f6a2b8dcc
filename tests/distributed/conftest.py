from tests.stages.conftest import adapted, files, run_stage  # noqa: F401 - fixtures
