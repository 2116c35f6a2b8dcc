from tests.models.fixtures import reward_folder, sft_folder  # noqa: F401 - fixtures
from tests.stages.conftest import adapted, files, full, run_stage  # noqa: F401 - fixtures
