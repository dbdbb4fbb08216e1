"""Both roles in one process: an attention and an FFN instance on the same device.

Owns two threads and their common end; each role has a session, links and streams of its own, as if
it were alone. Two processes on one GPU would take turns, and one that waits for the other would
wait through its own turn.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from step3rt.config import NodeConfig
from step3rt.errors import Unavailable
from step3rt.instance.device_share import DeviceShare
from step3rt.instance.node import Model, Role, open_model, prepare_process, serve_sessions

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""A role that has been drained waits for the other one, which hears of the same drain."""

OnFailure = Callable[[BaseException], NoReturn]
MakeRole = Callable[[NodeConfig, Model, DeviceShare], Role]


def run_colocated(config: NodeConfig, make_role: MakeRole, on_failure: OnFailure) -> int:
    """Runs both roles until they are drained; the attention role in this thread, the main one.

    Args:
        config: of both.
        make_role: makes one of them, in its own thread.
        on_failure: ends the process and what runs in it, with an error.

    Returns:
        The exit code 0.

    Raises:
        ConfigError: the checkpoint cannot be used, or the coordinator refuses an instance.
        Unavailable: no coordinator answers within `connect_timeout_s`.
    """
    prepare_process(config)
    model = open_model(config)
    share = DeviceShare(is_colocated=True)
    end = _CommonEnd(on_failure)

    def serve(role: str) -> None:
        own = replace(config, role=role)
        serve_sessions(own, model, make_role(own, model, share), end.has_begun)
        end.reached(role)

    def serve_ffn() -> None:
        try:
            serve("ffn")
        except BaseException as error:
            on_failure(error)

    # A daemon: an error of the other role must not wait for this one.
    ffn = threading.Thread(target=serve_ffn, name="step3rt-ffn", daemon=True)
    ffn.start()
    serve("attention")
    ffn.join()
    return 0


class _CommonEnd:
    """No role outlives the other one for long."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def has_begun(self) -> bool:
        """Whether one of the roles has ended: the other one looks for no new session."""
        return self._timer is not None

    def reached(self, role: str) -> None:
        """A role has been drained."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                return
            self._timer = threading.Timer(GRACE_S, self._give_up, [role])
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self, role: str) -> None:
        self._on_failure(
            Unavailable(
                f"The {role} role of this process was drained {GRACE_S:.0f} s ago, and the other "
                "one still runs. They begin and end together. Start the process again"
            )
        )
