"""What a launcher tells the processes that it starts, by environment variables. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from rlhf.errors import ConfigError

EXPECTED_PROCESSES = "RLHF_EXPECTED_PROCESSES"  # over all machines
TIMEOUT_VARIABLE = "RLHF_TIMEOUT"  # seconds
HEARTBEAT_FOLDER = "RLHF_HEARTBEAT_FOLDER"  # folder in which each process says that it lives and how it ended
DEFAULT_TIMEOUT = 1800
RENDEZVOUS_SECONDS = (
    60  # seconds that processes have at least to start and to find each other, however short the timeout
)
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH", re.IGNORECASE)
NOT_SECRET = ("TOKENIZERS_", "XAUTHORITY", "SSH_AUTH_SOCK")


def timeout_seconds(environment: Mapping[str, str] = os.environ) -> int:
    """How long a process waits for the others, and how long a step may take, before the job is ended.

    Raises: ConfigError if RLHF_TIMEOUT is no whole number of seconds from 1 up.
    """
    text = environment.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            "expected whole seconds, 1 or more", found=text, where=TIMEOUT_VARIABLE, do="set it, or use --timeout"
        )
    return int(text)


def secret_names(names: Iterable[str]) -> list[str]:
    """Those of some variable names that look as if they held a credential."""
    return sorted(n for n in set(names) if SECRET_NAME.search(n) and not n.startswith(NOT_SECRET))
