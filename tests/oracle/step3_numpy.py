"""Computes the Step-3 text forward in numpy float64: what every other implementation must equal.

It never trades clarity for speed, holds no KV cache, and shares no code with the product. Dims in
comments: T tokens, H hidden, N query heads, D head dim, R query rank, E experts, K top-k, I inner.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.oracle.config import OracleConfig, read_config
from tests.oracle.tensor_file import Array, read_weights


@dataclass(frozen=True, slots=True)
class Forward:
    """Result of one forward pass over T tokens.

    logits: float64[T, vocab].
    router_gap: float64[T], by how much the weakest chosen expert's router logit beats the strongest
        rejected one, the smallest over all MoE layers (inf without a choice). Where it is as small
        as another implementation's rounding error, that implementation may choose differently.
    """

    logits: Array
    router_gap: Array


@dataclass(frozen=True, slots=True)
class Greedy:
    """Result of greedy decoding.

    token_ids: the generated tokens; a stop token, where one was met, is the last of them.
    logprobs: float64[vocab] per generated token, the whole distribution that it was chosen from.
    margins: logit of the chosen token minus the runner-up's, per generated token.
    prompt_logprobs: log-probability of each prompt token but the first, given those before it.
    finish_reason: "stop" or "length".
    """

    token_ids: list[int]
    logprobs: list[Array]
    margins: list[float]
    prompt_logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Step3Oracle:
    """The model: `weights` maps checkpoint names to dequantised float64 arrays."""

    config: OracleConfig
    weights: Mapping[str, Array] = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> "Step3Oracle":
        """Reads `config.json` and the safetensors files of a model directory."""
        config = read_config(directory)
        return cls(config, read_weights(directory, config.weight_block_size))

    def logits(self, token_ids: Sequence[int]) -> Array:
        """Returns float64[T, vocab]: row t is the distribution of token t + 1."""
        return self.forward(token_ids).logits

    def forward(self, token_ids: Sequence[int], first_position: int = 0) -> Forward:
        """Runs all layers over one sequence of T tokens at positions from `first_position` on.

        Raises:
            ValueError: no tokens, or an id outside the vocabulary.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"token ids must be 1 or more of 0..{self.config.vocab_size - 1}")

        positions = first_position + np.arange(ids.size)
        router_gap = np.full(ids.size, np.inf)
        x = self.weights["model.embed_tokens.weight"][ids]  # [T, H]
        for layer in range(self.config.num_layers):
            x = x + self._attention(layer, self._norm(layer, "input_layernorm", x), positions)
            h = self._norm(layer, "post_attention_layernorm", x)
            if layer in self.config.moe_layers:
                router_logits = h @ self._weight(layer, "moe.gate").T  # [T, E]
                router_gap = np.minimum(router_gap, choice_gap(router_logits, self.config.top_k))
                x = x + self._experts(layer, h, router_logits)
                x = x + self._feed_forward(layer, "share_expert", h)
            else:
                x = x + self._feed_forward(layer, "mlp", h)
        x = rms_norm(x, self.weights["model.norm.weight"], self.config.rms_norm_eps)
        return Forward(logits=x @ self.weights["lm_head.weight"].T, router_gap=router_gap)

    def generate_greedy(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop_token_ids: Collection[int] = (),
    ) -> Greedy:
        """Appends the most likely token (the lowest id of equals) up to `max_tokens` times.

        Each step recomputes the whole sequence. Pass `config.eos_token_ids` to stop at those.
        """
        generated: list[int] = []
        logprobs: list[Array] = []
        margins: list[float] = []
        prompt_logprobs: list[float] = []
        finish_reason = "length"
        while len(generated) < max_tokens:
            logits = self.logits([*prompt, *generated])
            if not generated:
                rows = log_softmax(logits)
                prompt_logprobs = [float(rows[t, prompt[t + 1]]) for t in range(len(prompt) - 1)]
            runner_up, best = np.sort(logits[-1])[-2:]
            generated.append(int(np.argmax(logits[-1])))
            logprobs.append(log_softmax(logits[-1]))
            margins.append(float(best - runner_up))
            if generated[-1] in stop_token_ids:
                finish_reason = "stop"
                break
        return Greedy(generated, logprobs, margins, prompt_logprobs, finish_reason)

    def _weight(self, layer: int, module: str) -> Array:
        return self.weights[f"model.layers.{layer}.{module}.weight"]

    def _norm(self, layer: int, module: str, x: Array) -> Array:
        return rms_norm(x, self._weight(layer, module), self.config.rms_norm_eps)

    def _attention(self, layer: int, h: Array, positions: NDArray[np.int64]) -> Array:
        """Multi-matrix factorization attention: h[T, H] -> [T, H]; one K and one V head."""
        num_tokens = h.shape[0]
        num_heads, head_dim = self.config.num_heads, self.config.head_dim

        latent = h @ self._weight(layer, "self_attn.q_proj").T  # [T, R]
        latent = self._norm(layer, "self_attn.inter_norm", latent)  # over all of R
        q = latent @ self._weight(layer, "self_attn.wq").T  # [T, N * D]
        q = q.reshape(num_tokens, num_heads, head_dim)
        k = h @ self._weight(layer, "self_attn.k_proj").T  # [T, D]
        v = h @ self._weight(layer, "self_attn.v_proj").T  # [T, D]

        q = rotate(q, positions[:, None], self.config.rope_theta)
        k = rotate(k, positions, self.config.rope_theta)

        scores = np.einsum("tnd,sd->nts", q, k) / head_dim**0.5
        is_future = np.arange(num_tokens)[None, :] > np.arange(num_tokens)[:, None]  # [T, S]
        scores = np.where(is_future, -np.inf, scores)
        heads = np.einsum("nts,sd->tnd", softmax(scores), v)
        concatenated = heads.reshape(num_tokens, num_heads * head_dim)
        return concatenated @ self._weight(layer, "self_attn.o_proj").T

    def _feed_forward(self, layer: int, module: str, h: Array) -> Array:
        """Dense MLP or shared expert: h[T, H] -> [T, H]."""
        return swiglu(
            h,
            gate=self._weight(layer, f"{module}.gate_proj"),
            up=self._weight(layer, f"{module}.up_proj"),
            down=self._weight(layer, f"{module}.down_proj"),
        )

    def _experts(self, layer: int, h: Array, router_logits: Array) -> Array:
        """Weighted sum over each token's top-k routed experts: h[T, H] -> [T, H]."""
        topk_ids, topk_weights = choose_experts(
            router_logits, self.config.top_k, self.config.norm_expert_weight
        )
        gate = self._weight(layer, "moe.gate_proj")  # [E, I, H]
        up = self._weight(layer, "moe.up_proj")  # [E, I, H]
        down = self._weight(layer, "moe.down_proj")  # [E, H, I]

        total = np.zeros_like(h)
        for expert in range(self.config.num_experts):
            tokens, ranks = np.nonzero(topk_ids == expert)
            output = swiglu(h[tokens], gate=gate[expert], up=up[expert], down=down[expert])
            total[tokens] += topk_weights[tokens, ranks, None] * output
        return total


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divides by the root mean square over the last dim, then multiplies with the weight."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rotate(x: Array, positions: NDArray[np.int64], theta: float) -> Array:
    """Applies rotary position embedding, half-split: dim j turns together with dim j + D/2.

    x: [..., D]; positions: broadcastable to x's leading dims. The angles are float32 values, as in
    the published model: the frequency and then the angle are rounded to float32, once each. Exact
    angles would move logits by 4e-7 of the largest at position 300, and frequencies from a float32
    power function by 1e-6 (head dim 32, four layers).
    """
    half = x.shape[-1] // 2
    frequency = (theta ** (-2.0 * np.arange(half) / x.shape[-1])).astype(np.float32)
    angle = (positions[..., None].astype(np.float32) * frequency).astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Softmax over the last dim; -inf entries get probability 0."""
    exponentials = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exponentials / np.sum(exponentials, axis=-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    """Natural logarithm of softmax over the last dim."""
    shifted = x - np.max(x, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def swiglu(h: Array, *, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate h) * up h): h[T, H], gate and up [I, H], down [H, I] -> [T, H]."""
    gated = h @ gate.T
    silu = gated / (1.0 + np.exp(-gated))
    return (silu * (h @ up.T)) @ down.T


def choose_experts(
    router_logits: Array, top_k: int, norm_expert_weight: bool
) -> tuple[NDArray[np.int64], Array]:
    """Returns topk_ids i64[T, K] and topk_weights float64[T, K], best first.

    The softmax runs over all experts; without `norm_expert_weight` the chosen probabilities are
    used as they are, so that they sum to less than 1. Of equal experts the lower id wins.
    """
    probabilities = softmax(router_logits)
    topk_ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    topk_weights = np.take_along_axis(probabilities, topk_ids, axis=-1)
    if norm_expert_weight:
        topk_weights = topk_weights / np.sum(topk_weights, axis=-1, keepdims=True)
    return topk_ids, topk_weights


def choice_gap(router_logits: Array, top_k: int) -> Array:
    """Returns float64[T]: the K-th largest router logit minus the next one, inf if none is left."""
    num_tokens, num_experts = router_logits.shape
    if top_k >= num_experts:
        return np.full(num_tokens, np.inf)
    descending = -np.sort(-router_logits, axis=-1)
    return descending[:, top_k - 1] - descending[:, top_k]
