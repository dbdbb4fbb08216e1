"""What both kinds of instance share: the session with the coordinator, and coming back to it.

Owns the life of the process; it never computes.
"""

import enum
import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from step3rt import _core
from step3rt.config import NodeConfig, resolve_model
from step3rt.errors import Cancelled, Unavailable
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.weights import Progress

logger = logging.getLogger(__name__)

# Longest sleep of an idle loop; each round feeds the watchdog.
IDLE_TIMEOUT_S = 1.0


class Outcome(enum.Enum):
    """Why an instance's loop ended."""

    DRAINED = enum.auto()
    LOST = enum.auto()


class Role(Protocol):
    """One of the two kinds of instance, over all its sessions."""

    def run(self, session: _core.NodeSession) -> Outcome:
        """Loads what the session's settings ask for, becomes ready, and serves until it ends."""


def run_node(config: NodeConfig, make_role: Callable[[Checkpoint], Role]) -> int:
    """Runs one instance until it is drained, with a new session whenever one is lost.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: the checkpoint cannot be used, or the coordinator refuses this instance.
        Unavailable: no coordinator answers within `connect_timeout_s`.
    """
    torch.set_num_threads(config.threads)
    # torch leaves 190,000 objects; looking through them takes the collector 0.1 s and more, in the
    # middle of some step. Frozen objects are not looked at.
    gc.collect()
    gc.freeze()
    checkpoint = Checkpoint.open(resolve_model(config.model))
    role = make_role(checkpoint)
    while True:
        logger.info(
            "Looking for the coordinator at %s, for up to %g s",
            config.coordinator,
            config.connect_timeout_s,
        )
        try:
            session = connect(config, checkpoint)
        except Cancelled:
            logger.info("Stopped before a coordinator was found")
            return 0
        try:
            if role.run(session) is Outcome.DRAINED:
                logger.info("Stopped, as it was told")
                return 0
        except Unavailable as error:
            # The session ended between two polls; the next one begins from the start.
            logger.warning("The session with the coordinator is over: %s", error)
        finally:
            session.close()


def load_progress(session: _core.NodeSession) -> Progress:
    """Reports loading as the session's status, whole per cents, and as a bar on a terminal."""
    bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty())
    last_percent = -1

    def report(done_bytes: int, total_bytes: int, phase: str) -> None:
        nonlocal last_percent
        percent = 100 * done_bytes // total_bytes
        if percent != last_percent:
            last_percent = percent
            session.set_status(f"loading weights {percent} %, {phase}")
        bar.total = total_bytes
        bar.set_description(phase, refresh=False)
        bar.update(done_bytes - bar.n)
        if done_bytes == total_bytes:
            bar.close()

    return report


def connect(config: NodeConfig, checkpoint: Checkpoint) -> _core.NodeSession:
    """Opens a session that says what this instance is, looking for `connect_timeout_s`.

    Raises:
        ConfigError: the coordinator refuses this instance.
        Unavailable: no coordinator answers in time.
        Cancelled: a signal came first.
    """
    model = checkpoint.config
    options = {
        "coordinator": config.coordinator,
        "role": config.role,
        "data_host": config.data_host,
        "connect_timeout_s": config.connect_timeout_s,
        "tls_cert": _text(config.tls_cert),
        "tls_key": _text(config.tls_key),
        "tls_ca": _text(config.tls_ca),
        "spin_us": config.spin_us,
        "model_fingerprint": checkpoint.fingerprint(),
        "model": {
            "name": checkpoint.directory.name,
            "vocab_size": model.vocab_size,
            "max_model_len": model.max_model_len,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_experts": model.num_experts,
            "num_experts_per_token": model.top_k,
            "eos_token_ids": list(model.eos_token_ids),
            "bos_token_id": model.bos_token_id,
        },
    }
    return _core.NodeSession(json.dumps(options))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
