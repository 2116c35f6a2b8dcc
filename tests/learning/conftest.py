from tests.models.fixtures import adapter_folder, reward_folder, sft_folder  # noqa: F401 - fixtures
