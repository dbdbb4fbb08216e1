"""A device attention instance's KV blocks, from one session's settings to the next one's."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step3rt.config import NodeConfig
from step3rt.errors import ConfigError
from step3rt.instance import device_attention
from step3rt.instance.device_attention import DeviceAttentionRole
from step3rt.instance.device_setup import DeviceModel
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.device_attention import DevicePool
from step3rt.model.gpu_weights import CheckpointTensors
from step3rt.ops.kv_cache import bf16_cache_shape
from tests.fixtures.device_party import NANO, attention_weights

CPU = torch.device("cpu")


class Host:
    """Memory of which pools that live take their part."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._pools: list[weakref.ref[DevicePool]] = []

    def watch(self, pool: DevicePool) -> DevicePool:
        self._pools.append(weakref.ref(pool))
        return pool

    def available_bytes(self) -> int:
        pools = [pool for reference in self._pools if (pool := reference()) is not None]
        return self._num_bytes - sum(kv.nbytes for pool in pools for kv in pool.kv)


def settings(kv_dtype: str) -> Any:
    """As `_core.Settings`."""
    return SimpleNamespace(kv_dtype=kv_dtype, max_model_len=256, max_tokens_per_micro_batch=4)


def room_for(num_bf16_blocks: int) -> int:
    layer_bytes = 2 * torch.Size(bf16_cache_shape(num_bf16_blocks)).numel()
    return layer_bytes * len(attention_weights(CPU).layers)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """One with room for 12 blocks in BF16, or 24 in FP8."""
    host = Host(room_for(12))
    monkeypatch.setattr(device_attention, "available_memory_bytes", host.available_bytes)
    return host


def new_role(**node: Any) -> DeviceAttentionRole:
    checkpoint = Checkpoint.open(NANO)
    model = DeviceModel(checkpoint.config, CheckpointTensors(checkpoint, CPU), CPU)
    return DeviceAttentionRole(NodeConfig(role="attention", model=NANO, **node), model)


def test_a_pool_in_another_format_may_have_the_memory_of_the_one_before(host: Host) -> None:
    role = new_role(kv_memory_mb=room_for(8) >> 20)
    weights = attention_weights(CPU)
    for kv_dtype, num_blocks in (("fp8", 16), ("bfloat16", 8), ("fp8", 16)):
        pool = host.watch(role._allocate(settings(kv_dtype), weights))
        assert pool.options.num_blocks == num_blocks
        assert role._allocate(settings(kv_dtype), weights) is pool
        del pool


def test_as_many_blocks_as_before_that_have_become_too_large_are_refused(host: Host) -> None:
    role = new_role(kv_blocks=20)
    host.watch(role._allocate(settings("fp8"), attention_weights(CPU)))
    with pytest.raises(ConfigError, match="KV pool of 20 blocks takes"):
        role._allocate(settings("bfloat16"), attention_weights(CPU))
