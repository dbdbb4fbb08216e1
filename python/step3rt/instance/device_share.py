"""What the roles of one process agree on: whose turn it is to load, and which SMs each fills.

An instance that is alone in its process has the device to itself. docs/device.md says why roles
that share a GPU cannot hold each other up.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

from step3rt import _core
from step3rt.model.device_attention import SMS_PER_WAITING_LANE as ATTENTION_SMS
from step3rt.model.device_ffn import SMS_PER_WAITING_LANE as FFN_SMS
from step3rt.ops.launch import num_sms

IDLE_LIMIT_NS = 50_000_000
"""After which an FFN lane that nobody needs ends its step, on a GPU that both roles use: longer
than what is between two steps, and short enough for what waits for the whole GPU."""

_TURN_STATUS_S = 1.0


class DeviceShare:
    """How a role uses its device."""

    def __init__(self, *, is_colocated: bool = False) -> None:
        """`is_colocated`: an attention and an FFN role have the same share."""
        self.is_colocated = is_colocated
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def turn(self, session: _core.NodeSession) -> Iterator[None]:
        """Loads, allocates and captures one role after the other."""
        while not self._turn.acquire(timeout=_TURN_STATUS_S):
            # Also a sign of life.
            session.set_status("waiting until the process's other role has loaded")
        try:
            yield
        finally:
            self._turn.release()

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
