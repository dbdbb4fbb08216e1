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
from step3rt.instance.loading_status import LoadingStatus
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.config import Step3Config
from step3rt.model.random_weights import MadeUpModel
from step3rt.model.weights import Progress

logger = logging.getLogger(__name__)

# Longest sleep of an idle loop; each round feeds the watchdog.
IDLE_TIMEOUT_S = 1.0


class Outcome(enum.Enum):
    """Why an instance's loop ended."""

    DRAINED = enum.auto()
    LOST = enum.auto()


class Model(Protocol):
    """What a session says of a model: a checkpoint, or sizes alone."""

    @property
    def directory(self) -> Path:
        """Where its config.json is; its name is the model's."""

    @property
    def config(self) -> Step3Config:
        """Its sizes."""

    def fingerprint(self) -> str:
        """What all instances of a cluster must agree on."""


class Role(Protocol):
    """One of the two kinds of instance, over all its sessions."""

    def run(self, session: _core.NodeSession) -> Outcome:
        """Loads what the session's settings ask for, becomes ready, and serves until it ends."""


def run_node(config: NodeConfig, make_role: Callable[[Model], Role]) -> int:
    """Runs one instance until it is drained, with a new session whenever one is lost.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: the checkpoint cannot be used, or the coordinator refuses this instance.
        Unavailable: no coordinator answers within `connect_timeout_s`.
    """
    prepare_process(config)
    model = open_model(config)
    serve_sessions(config, model, make_role(model))
    return 0


def prepare_process(config: NodeConfig) -> None:
    """Sets what belongs to the process, before anything is loaded."""
    torch.set_num_threads(config.threads)
    # torch leaves 190,000 objects; looking through them takes the collector 0.1 s and more, in the
    # middle of some step. Frozen objects are not looked at.
    gc.collect()
    gc.freeze()


def serve_sessions(
    config: NodeConfig, model: Model, role: Role, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Serves session after session until one is drained, or is lost when `is_over` says so.

    Raises:
        ConfigError: the checkpoint cannot be read, or the coordinator refuses this instance.
        Unavailable: no coordinator answers within `connect_timeout_s`.
    """
    # Once: what is loaded stays what it is, whatever becomes of the files until the next session.
    fingerprint = model.fingerprint()
    while not is_over():
        logger.info(
            "Looking for the coordinator at %s, for up to %g s",
            config.coordinator,
            config.connect_timeout_s,
        )
        try:
            session = connect(config, model, fingerprint)
        except Cancelled:
            logger.info("Stopped before a coordinator was found")
            return
        try:
            if role.run(session) is Outcome.DRAINED:
                logger.info("Stopped, as it was told")
                return
        except Cancelled:
            logger.info("Stopped while it loaded, as it was told")
            return
        except Unavailable as error:
            # The session ended between two polls; the next one begins from the start.
            logger.warning("The session with the coordinator is over: %s", error)
        finally:
            session.close()


def open_model(config: NodeConfig) -> Model:
    """The model that a process serves.

    Raises:
        ConfigError: it cannot be used.
    """
    directory = resolve_model(config.model)
    if config.random_weights:
        return MadeUpModel.open(directory)
    return Checkpoint.open(directory)


def load_progress(session: _core.NodeSession) -> Progress:
    """Reports loading as the session's status, whole per cents, and as a bar on a terminal."""
    bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty())
    status = LoadingStatus(session)
    last_percent, text = -1, ""

    def report(done_bytes: int, total_bytes: int, phase: str) -> None:
        nonlocal last_percent, text
        percent = 100 * done_bytes // total_bytes
        if percent != last_percent:
            last_percent, text = percent, f"loading weights {percent} %, {phase}"
        status.say(text)
        bar.total = total_bytes
        bar.set_description(phase, refresh=False)
        bar.update(done_bytes - bar.n)
        if done_bytes == total_bytes:
            bar.close()

    return report


def connect(config: NodeConfig, model: Model, fingerprint: str) -> _core.NodeSession:
    """Opens a session that says what this instance is, looking for `connect_timeout_s`.

    Raises:
        ConfigError: the coordinator refuses this instance.
        Unavailable: no coordinator answers in time.
        Cancelled: a signal came first.
    """
    sizes = model.config
    options = {
        "coordinator": config.coordinator,
        "role": config.role,
        "data_host": config.data_host,
        "connect_timeout_s": config.connect_timeout_s,
        "tls_cert": _text(config.tls_cert),
        "tls_key": _text(config.tls_key),
        "tls_ca": _text(config.tls_ca),
        "spin_us": config.spin_us,
        "model_fingerprint": fingerprint,
        "model": {
            "name": model.directory.name,
            "vocab_size": sizes.vocab_size,
            "max_model_len": sizes.max_model_len,
            "num_layers": sizes.num_layers,
            "hidden_size": sizes.hidden_size,
            "num_experts": sizes.num_experts,
            "num_experts_per_token": sizes.top_k,
            "eos_token_ids": list(sizes.eos_token_ids),
            "bos_token_id": sizes.bos_token_id,
        },
    }
    return _core.NodeSession(json.dumps(options))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
