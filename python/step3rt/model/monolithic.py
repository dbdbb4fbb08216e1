"""The whole model in one process: the reference that a cluster must agree with.

Owns no step loop and no transport; sequences are computed one at a time.
"""

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from step3rt.model.batch import Batch, Chunk
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.config import Step3Config
from step3rt.model.kv_cache import KvCache, kv_block_bytes
from step3rt.model.placement import place
from step3rt.model.step3 import FfnRequest, compute_logits, forward
from step3rt.model.weights import (
    AttentionWeights,
    FfnWeights,
    load_attention_weights,
    load_ffn_weights,
)
from step3rt.ops.moe import grouped_experts

BLOCK_SIZE_TOKENS = 64


class MonolithicModel:
    """Both roles' weights, and one sequence's KV cache at a time."""

    def __init__(
        self,
        config: Step3Config,
        attention: AttentionWeights,
        ffn: FfnWeights,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`kv_dtype` None keeps K and V in the compute dtype."""
        self.config = config
        self.attention = attention
        self.ffn = ffn
        self.dtype = attention.embed_tokens.dtype
        self.kv_dtype = kv_dtype or self.dtype

    @classmethod
    def load(
        cls,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> "MonolithicModel":
        """Loads a model directory.

        Raises:
            ConfigError: its config.json or its tensors cannot be used.
        """
        checkpoint = Checkpoint.open(directory)
        experts = range(checkpoint.config.num_experts)
        return cls(
            checkpoint.config,
            load_attention_weights(checkpoint, dtype),
            load_ffn_weights(checkpoint, experts, dtype),
            kv_dtype,
        )

    def new_cache(self, num_tokens: int) -> KvCache:
        """Allocates the cache of one sequence of `num_tokens`."""
        num_blocks = -(-num_tokens // BLOCK_SIZE_TOKENS)
        block_bytes = kv_block_bytes(self.config, BLOCK_SIZE_TOKENS, self.kv_dtype)
        return KvCache(
            self.config,
            num_blocks=num_blocks,
            block_size_tokens=BLOCK_SIZE_TOKENS,
            dtype=self.kv_dtype,
            max_bytes=num_blocks * block_bytes,
        )

    @torch.inference_mode()
    def append(self, token_ids: Sequence[int], first_position: int, kv: KvCache) -> torch.Tensor:
        """Computes the next tokens of the one sequence in `kv`; returns logits f32[T, V]."""
        chunk = Chunk(token_ids, first_position, range(kv.num_blocks), range(len(token_ids)))
        batch = Batch.build([chunk], self.config, kv.block_size_tokens, self.dtype)
        final_hidden = run_locally(
            forward(batch, self.config, self.attention, kv), self.config, self.ffn
        )
        return compute_logits(final_hidden, self.attention)

    def logits(self, token_ids: Sequence[int], chunk_tokens: int | None = None) -> torch.Tensor:
        """Returns f32[T, V]: row t is the distribution of token t + 1.

        `chunk_tokens` computes the sequence in chunks of that many tokens.
        """
        kv = self.new_cache(len(token_ids))
        step = chunk_tokens or len(token_ids)
        return torch.cat(
            [
                self.append(token_ids[first : first + step], first, kv)
                for first in range(0, len(token_ids), step)
            ]
        )

    def generate_greedy(
        self, prompt: Sequence[int], max_tokens: int, stop_token_ids: Sequence[int] = ()
    ) -> tuple[list[int], torch.Tensor]:
        """Appends the most likely token (of equals the lowest id) up to `max_tokens` times.

        Returns:
            The generated ids, a stop token included, and the logits f32[G, V] of each.
        """
        kv = self.new_cache(len(prompt) + max_tokens)
        generated: list[int] = []
        rows: list[torch.Tensor] = []
        new_tokens = list(prompt)
        position = 0
        while len(generated) < max_tokens:
            rows.append(self.append(new_tokens, position, kv)[-1])
            position += len(new_tokens)
            new_tokens = [int(rows[-1].argmax())]
            generated += new_tokens
            if generated[-1] in stop_token_ids:
                break
        return generated, torch.stack(rows)


def run_locally(
    steps: Generator[FfnRequest, torch.Tensor, torch.Tensor],
    config: Step3Config,
    ffn: FfnWeights,
) -> torch.Tensor:
    """Drives `forward` to its end with FFNs of this process; returns the final hidden state."""
    try:
        request = next(steps)
        while True:
            request = steps.send(compute_ffn(request, config, ffn))
    except StopIteration as end:
        final_hidden: torch.Tensor = end.value
        return final_hidden


def compute_ffn(request: FfnRequest, config: Step3Config, ffn: FfnWeights) -> torch.Tensor:
    """Computes one layer's FFN in this process, f32[T, H]."""
    (whole,) = place(
        request.topk_ids,
        request.topk_weights,
        num_experts=config.num_experts,
        top_k=config.top_k,
        ep_size=1,
    )
    return grouped_experts(
        request.hidden, whole.expert_ids, whole.expert_weights, ffn.layers[request.layer].stacks
    )
