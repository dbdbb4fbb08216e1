"""The attention instance: embedding, attention, KV cache, router, head and sampler.

Owns what outlives a session: the weights and the KV pool. It never holds an expert.
"""

import logging
from pathlib import Path

import torch

from step3rt import _core
from step3rt.config import NodeConfig
from step3rt.errors import ConfigError
from step3rt.instance.node import Outcome, load_progress
from step3rt.instance.step_loop import StepLoop
from step3rt.instance.wire import DTYPES, slot_layouts
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.kv_cache import KvCache, kv_block_bytes
from step3rt.model.weights import AttentionWeights, load_attention_weights

logger = logging.getLogger(__name__)


class AttentionRole:
    """An attention instance over all its sessions."""

    def __init__(self, node: NodeConfig, checkpoint: Checkpoint) -> None:
        self._node = node
        self._checkpoint = checkpoint
        self._weights: AttentionWeights | None = None
        self._kv: KvCache | None = None

    def run(self, session: _core.NodeSession) -> Outcome:
        """Loads weights, allocates KV blocks unless both are at hand, and serves plans."""
        settings = session.settings
        weights = self._load(session, DTYPES[settings.compute_dtype])
        kv = self._allocate(settings.block_size_tokens, DTYPES[settings.kv_dtype])
        layouts = slot_layouts(settings, self._checkpoint.config)
        session.bind(layouts[0].slot_bytes, layouts[1].slot_bytes)
        session.ready(kv.num_blocks)
        logger.info("Ready with %d KV blocks", kv.num_blocks)
        return StepLoop(session, self._checkpoint.config, weights, kv, layouts).run()

    def _load(self, session: _core.NodeSession, dtype: torch.dtype) -> AttentionWeights:
        if self._weights is None or self._weights.embed_tokens.dtype != dtype:
            self._weights = None  # frees them before others are loaded
            self._weights = load_attention_weights(self._checkpoint, dtype, load_progress(session))
        return self._weights

    def _allocate(self, block_size_tokens: int, dtype: torch.dtype) -> KvCache:
        kv = self._kv
        if kv is None or kv.blocks.dtype != dtype or kv.block_size_tokens != block_size_tokens:
            self._kv = None
            config = self._checkpoint.config
            num_blocks = self._node.kv_blocks
            if num_blocks is None:
                block_bytes = kv_block_bytes(config, block_size_tokens, dtype)
                num_blocks = (self._node.kv_memory_mb << 20) // block_bytes
            kv = self._kv = KvCache(
                config,
                num_blocks=num_blocks,
                block_size_tokens=block_size_tokens,
                dtype=dtype,
                max_bytes=available_memory_bytes(),
            )
            if self._node.random_kv:
                logger.warning("All KV blocks are filled with random values, for measurements")
                kv.fill_randomly()
        return kv


def available_memory_bytes() -> int:
    """Memory that this host can still give (`MemAvailable`).

    Raises:
        ConfigError: the kernel does not say.
    """
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError(
        "/proc/meminfo has no MemAvailable. The size of the KV pool is checked against it. "
        "Use Linux 3.14 or newer."
    )
