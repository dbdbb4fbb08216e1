"""What the roles of one process agree on: whose turn it is to load, and which SMs each fills.

An instance that is alone in its process has the device to itself. docs/device.md says why roles
that share a GPU cannot hold each other up.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import torch

from step3rt.model.device_attention import SMS_PER_WAITING_LANE as ATTENTION_SMS
from step3rt.model.device_ffn import SMS_PER_WAITING_LANE as FFN_SMS
from step3rt.ops.launch import num_sms

IDLE_LIMIT_NS = 50_000_000
"""After which an FFN lane that nobody needs ends its step, on a GPU that both roles use: longer
than what is between two steps, and short enough for what waits for the whole GPU."""

FFN_HEAD_START_S = 5.0
"""How long the attention role lets the FFN role begin first: what its weights leave free is what KV
blocks can have, and experts take gigabytes more while they are laid out than afterwards."""

_TURN_STATUS_S = 1.0


class Session(Protocol):
    """What is used here of `_core.NodeSession`."""

    def set_status(self, text: str) -> None:
        """Shows what the instance does."""


class DeviceShare:
    """How a role uses its device."""

    def __init__(self, *, is_colocated: bool = False) -> None:
        """`is_colocated`: an attention and an FFN role have the same share."""
        self.is_colocated = is_colocated
        self._changed = threading.Condition()
        self._owner: str | None = None
        self._coming: set[str] = set()  # for the first time
        self._loaded: set[str] = set()

    @property
    def is_loading(self) -> bool:
        """Whether a role loads for the first time, or waits to do so.

        Its calls may wait for the whole GPU: what would be parked there makes each of them last.
        """
        return bool(self._coming)

    @contextlib.contextmanager
    def turn(self, session: Session, role: str) -> Iterator[None]:
        """Loads, allocates and captures one role after the other, first the FFN role."""
        begin_s = time.monotonic()
        with self._changed:
            if role not in self._loaded:
                self._coming.add(role)
            self._changed.notify_all()
            try:
                while not self._is_turn_of(role, time.monotonic() - begin_s):
                    self._changed.wait(_TURN_STATUS_S)
                    # Also a sign of life.
                    session.set_status("waiting until the process's other role has loaded")
            except BaseException:
                self._coming.discard(role)
                raise
            self._owner = role
        try:
            yield
            self._loaded.add(role)
        finally:
            with self._changed:
                self._owner = None
                self._coming.discard(role)
                self._changed.notify_all()

    def _is_turn_of(self, role: str, waited_s: float) -> bool:
        if self._owner is not None:
            return False
        is_first = role == "ffn" or not self.is_colocated
        is_ffn_known = "ffn" in self._coming | self._loaded
        # One that is known and has no turn yet takes it now.
        return (
            is_first or "ffn" in self._loaded or (not is_ffn_known and waited_s >= FFN_HEAD_START_S)
        )

    def idle_limit_ns(self, device: torch.device) -> int:
        """How long an FFN lane waits for a step to begin; 0: without a limit."""
        return IDLE_LIMIT_NS if self.is_colocated and device.type == "cuda" else 0

    def attention_ctas(
        self, device: torch.device, num_lanes: int, wanted: int | None = None
    ) -> int | None:
        """CTAs of attention's kernels that fill an SM each; None: as `AttentionLane` has it.

        Another lane that waits, the experts' ones too, holds a part of an SM where none fits.
        """
        return self._ctas(device, num_lanes, ATTENTION_SMS, wanted)

    def ffn_ctas(
        self, device: torch.device, num_lanes: int, wanted: int | None = None
    ) -> int | None:
        """CTAs of the experts' kernels, an even number; None: as `FfnLane` has it.

        They come in pairs, and each other lane that waits, attention's too, takes a pair's place.
        """
        num_ctas = self._ctas(device, num_lanes, FFN_SMS, wanted)
        return None if num_ctas is None else max(2, num_ctas // 2 * 2)

    def _ctas(
        self, device: torch.device, num_lanes: int, sms_per_waiting_lane: int, wanted: int | None
    ) -> int | None:
        if device.type != "cuda" or (wanted is None and not self.is_colocated):
            return None
        left = num_sms(device) - sms_per_waiting_lane * (2 * num_lanes - 1)
        return max(1, min(wanted or left, num_sms(device)))
