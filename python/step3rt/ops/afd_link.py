"""Whole AFD layers over slots and flags in each other's memory, between processes of one host.

An attention instance has `AttentionSlots`, an FFN instance `FfnSlots`; neither exchanges anything
itself: whoever connects two processes passes `handle` across and calls `connect` on both ends, on
all FFN ranks before the attention instance sends. One lane of a step:

    attention    send(lane, …, is_first_layer)   wait(lane, …)   sums(lane), present(lane)
    FFN rank     wait(lane, is_first_layer)      tokens(lane)    push(lane, sums)

Frames of a lane and peer are numbered from 1 under an epoch, on the device. A reply is the credit:
a slot is not written again before what it held has been answered. Which sources begin a step
together is decided by FFN rank 0 alone; the sources carry its decision to the other ranks.
"""

from step3rt.ops.afd_attention import AttentionSlots
from step3rt.ops.afd_endpoint import DEFAULT_WAIT_LIMIT_NS
from step3rt.ops.afd_ffn import DEFAULT_JOIN_WINDOW_NS, DEFAULT_STEP_LIMIT_NS, FfnSlots
from step3rt.ops.afd_slots import AfdShape, LaneErrors, LaneState
from step3rt.ops.device_link import LinkError, StopWord

__all__ = [
    "DEFAULT_JOIN_WINDOW_NS",
    "DEFAULT_STEP_LIMIT_NS",
    "DEFAULT_WAIT_LIMIT_NS",
    "AfdShape",
    "AttentionSlots",
    "FfnSlots",
    "LaneErrors",
    "LaneState",
    "LinkError",
    "StopWord",
]
