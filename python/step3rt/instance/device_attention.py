"""The attention instance of the device pipeline over all its sessions.

Owns what outlives a session: weights, K and V, slots, lanes and their graphs. It never holds an
expert.
"""

import logging
import time
from dataclasses import dataclass

import torch

from step3rt import _core
from step3rt.config import NodeConfig
from step3rt.errors import ConfigError, Unavailable
from step3rt.instance.attention import available_memory_bytes
from step3rt.instance.device_links import FfnLinks
from step3rt.instance.device_loop import DeviceLane, DeviceStepLoop
from step3rt.instance.device_setup import (
    SLOT_BYTES,
    DeviceModel,
    check_settings,
    link_shape,
    report_loading,
    wait_limit_ns,
)
from step3rt.instance.device_share import DeviceShare
from step3rt.instance.device_trace import LaneTraces
from step3rt.instance.node import Outcome
from step3rt.instance.sequence_table import SequenceTable
from step3rt.model.device_attention import AttentionLane, DevicePool, DevicePoolOptions
from step3rt.model.gpu_weights import GpuWeights, build_attention_weights
from step3rt.ops.afd_link import AttentionSlots
from step3rt.ops.afd_slots import AfdShape
from step3rt.ops.device_link import StopWord
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.trace.step_times import StepTimes

logger = logging.getLogger(__name__)

SURPLUS_PAUSE_S = 1.0
"""Before an instance that has no place in the cluster asks again."""


@dataclass(slots=True)
class _Ends:
    """The slots of one source and what is bound to them; good for any session of the same shape."""

    key: tuple[AfdShape, int, DevicePoolOptions]
    slots: AttentionSlots
    stop: StopWord
    lanes: list[AttentionLane]


class DeviceAttentionRole:
    """A device attention instance over all its sessions."""

    def __init__(
        self, node: NodeConfig, model: DeviceModel, share: DeviceShare | None = None
    ) -> None:
        """Loads nothing yet; `share`: with the FFN role of this process, if there is one."""
        self._node = node
        self._model = model
        self._share = share or DeviceShare()
        self._weights: GpuWeights | None = None
        self._pool: DevicePool | None = None
        self._ends: _Ends | None = None

    def run(self, session: _core.NodeSession) -> Outcome:
        """Loads weights, allocates KV blocks unless both are at hand, and serves plans."""
        settings = session.settings
        check_settings(settings)
        shape = link_shape(settings, self._model.config)
        if session.role_rank >= shape.num_sources:
            time.sleep(SURPLUS_PAUSE_S)
            raise Unavailable(
                f"This would be attention instance {session.role_rank + 1} of "
                f"{shape.num_sources}. The FFN instances have slots for no more. Wait until one "
                "leaves, or start the cluster with a larger `attention`"
            )
        with self._share.turn(session, "attention"):
            if self._weights is None:
                tensors = report_loading(self._model.tensors, session)
                self._weights = build_attention_weights(tensors)
            pool = self._allocate(settings, self._weights)
            ends = self._prepare(shape, session.role_rank, pool)
        session.bind(SLOT_BYTES, SLOT_BYTES, device_offer=ends.slots.handle)
        session.ready(pool.options.num_blocks)
        logger.info("Ready on %s with %d KV blocks", pool.device, pool.options.num_blocks)
        traces = LaneTraces.start(self._node, session.role_rank, pool.config.num_layers, ends.slots)
        links = FfnLinks(session, ends.slots, ends.stop, shape.num_ranks)
        lanes = [
            DeviceLane(
                index,
                SequenceTable(
                    num_slots=pool.options.max_tokens,
                    num_blocks=pool.options.num_blocks,
                    max_model_len=pool.options.max_model_len,
                    vocab_size=pool.config.vocab_size,
                ),
                device,
                [device.new_host_step() for _ in range(settings.max_steps_in_flight)],
            )
            for index, device in enumerate(ends.lanes)
        ]
        times = StepTimes()
        try:
            return DeviceStepLoop(session, ends.slots, links, lanes, times).run()
        finally:
            ends.stop.set()
            for lane in lanes:
                for step in lane.in_flight:
                    if step.event is not None:
                        step.event.wait()
            if traces is not None:
                traces.save(times)
            ends.slots.reset()
            ends.stop.clear()

    def _allocate(self, settings: _core.Settings, weights: GpuWeights) -> DevicePool:
        is_fp8_kv = settings.kv_dtype == "fp8"
        shape = fp8_cache_shape(1) if is_fp8_kv else bf16_cache_shape(1)
        layer_bytes = torch.Size(shape).numel() * (1 if is_fp8_kv else 2)
        block_bytes = layer_bytes * len(weights.layers)
        options = DevicePoolOptions(
            num_blocks=self._node.kv_blocks or (self._node.kv_memory_mb << 20) // block_bytes,
            max_model_len=settings.max_model_len,
            max_tokens=settings.max_tokens_per_micro_batch,
            is_fp8_kv=is_fp8_kv,
        )
        if self._pool is None or self._pool.options != options:
            self._pool = self._ends = None  # frees them before others are allocated
            self._check_memory(options.num_blocks, block_bytes)
            self._pool = DevicePool(weights, options)
            if self._node.random_kv:
                logger.warning("All KV blocks are filled with random values, for measurements")
                self._pool.fill_randomly()
        return self._pool

    def _check_memory(self, num_blocks: int, block_bytes: int) -> None:
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what loading weights left over is free, too
            max_bytes = torch.cuda.mem_get_info(device)[0]
        else:
            max_bytes = available_memory_bytes()
        if num_blocks < 1 or num_blocks * block_bytes > max_bytes:
            raise ConfigError(
                f"KV pool of {num_blocks} blocks takes {num_blocks * block_bytes} bytes. It must "
                f"have 1 block or more and fit in {max_bytes} bytes of memory. Change kv_blocks or "
                "kv_memory_mb."
            )

    def _prepare(self, shape: AfdShape, source: int, pool: DevicePool) -> _Ends:
        key = (shape, source, pool.options)
        if self._ends is None or self._ends.key != key:
            self._ends = None
            stop = StopWord(pool.device)
            limit_ns = wait_limit_ns(pool.device)
            slots = AttentionSlots(shape, source, pool.device, stop, limit_ns)
            # Nothing is linked: what a capture launches sends and awaits nothing.
            stop.set()
            num_ctas = self._share.attention_ctas(
                pool.device, shape.num_lanes, self._node.attention_sms
            )
            lanes = [AttentionLane(pool, slots, lane, num_ctas) for lane in range(shape.num_lanes)]
            slots.reset()
            stop.clear()
            self._ends = _Ends(key, slots, stop, lanes)
        return self._ends
