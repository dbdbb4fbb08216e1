"""The KV pool's limits, and what their refusal tells an operator to change."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from step3rt.config import NodeConfig, resolve_model
from step3rt.errors import ConfigError
from step3rt.model.config import Step3Config
from step3rt.model.kv_cache import KvCache, kv_block_bytes


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_a_pool_that_is_empty_or_too_large_is_refused_by_the_names_of_its_settings(
    num_blocks: int,
) -> None:
    config = Step3Config.from_directory(resolve_model(Path("nano")))
    room_for_two = 2 * kv_block_bytes(config, 64, torch.float32)
    with pytest.raises(ConfigError, match=f"KV pool of {num_blocks} blocks") as refused:
        KvCache(
            config,
            num_blocks=num_blocks,
            block_size_tokens=64,
            dtype=torch.float32,
            max_bytes=room_for_two,
        )
    settings = re.findall(r"\b\w+_\w+\b", str(refused.value))
    assert settings
    assert set(settings) <= {item.name for item in fields(NodeConfig)}
