from tests.models.fixtures import adapter_folder, reward_folder, rewarder, sft_folder  # noqa: F401 - fixtures
