"""Owns an attention instance's KV blocks; which block belongs to whom is the scheduler's."""

import torch

from step3rt.errors import ConfigError
from step3rt.model.config import Step3Config


class KvCache:
    """The paged pool: for each layer and block, the K and V of `block_size_tokens` tokens.

    blocks: [L, B, 2, bs, D]; float32, bfloat16, or e4m3 with scale 1.
    """

    def __init__(
        self,
        config: Step3Config,
        *,
        num_blocks: int,
        block_size_tokens: int,
        dtype: torch.dtype,
        max_bytes: int,
    ) -> None:
        """Allocates the pool.

        Raises:
            ConfigError: it would exceed `max_bytes`, or hold no block.
        """
        num_bytes = num_blocks * kv_block_bytes(config, block_size_tokens, dtype)
        if num_blocks < 1 or num_bytes > max_bytes:
            raise ConfigError(
                f"KV pool of {num_blocks} blocks takes {num_bytes} bytes. It must have 1 block or "
                f"more and fit in {max_bytes} bytes of memory. Change kv_blocks or kv_memory_mb."
            )
        shape = (config.num_layers, num_blocks, 2, block_size_tokens, config.head_dim)
        self.blocks = torch.zeros(shape, dtype=dtype)

    @property
    def num_blocks(self) -> int:
        """Number of blocks; each spans all layers."""
        return self.blocks.shape[1]

    @property
    def block_size_tokens(self) -> int:
        """Tokens that one block holds."""
        return self.blocks.shape[3]

    def fill_randomly(self, seed: int = 0) -> None:
        """Overwrites all blocks with values of unit variance, as normed K and V have about."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.blocks:
            layer.copy_(torch.randn(layer.shape, generator=generator))

    def layer(self, index: int) -> torch.Tensor:
        """One layer's [B, 2, bs, D]."""
        return self.blocks[index]


def kv_block_bytes(config: Step3Config, block_size_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return config.num_layers * 2 * block_size_tokens * config.head_dim * dtype.itemsize
