"""Environment variables by which a launcher configures the processes that it starts. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from rlhf.errors import ConfigError

EXPECTED_PROCESSES = "RLHF_EXPECTED_PROCESSES"
"""Number of processes over all machines that the launcher was asked for."""

TIMEOUT_VARIABLE = "RLHF_TIMEOUT"
"""Seconds that a process waits for the others; see `timeout_seconds`."""

LAUNCH_OPTIONS = "RLHF_LAUNCH_OPTIONS"
"""Options of the launch as JSON, from which a process that runs out of memory writes the command to run again."""

HEARTBEAT_FOLDER = "RLHF_HEARTBEAT_FOLDER"
"""Folder in which each process writes its heartbeats and how it ended, for the supervisor."""

DEFAULT_TIMEOUT = 1800
"""Seconds."""

RENDEZVOUS_SECONDS = 60
"""Least seconds that processes have to start and to find each other, however short the timeout is."""

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH", re.IGNORECASE)
NOT_SECRET = ("TOKENIZERS_", "XAUTHORITY", "SSH_AUTH_SOCK")


def timeout_seconds(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many seconds a process waits for the others, and a step may take, before the job is ended.

    Raises: ConfigError if RLHF_TIMEOUT is not a whole number of at least 1.
    """
    text = environment.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            "expected a number of whole seconds, 1 or more",
            found=text,
            where=TIMEOUT_VARIABLE,
            do="correct the variable, or use --timeout",
        )
    return int(text)


def secret_names(names: Iterable[str]) -> list[str]:
    """Return the variable names that look as if the variable held a credential, sorted."""
    return sorted(n for n in set(names) if SECRET_NAME.search(n) and not n.startswith(NOT_SECRET))
