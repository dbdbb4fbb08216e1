"""Makes up weights of a Step-3 model on its device, for full-size runs without a checkpoint.

Values are drawn so that activations keep their size from layer to layer and routers spread tokens
by their logits; they mean nothing. The same seed gives the same tensor whatever else is drawn.
"""

import hashlib

import torch

from step3rt.model.config import Step3Config
from step3rt.model.gpu_weights import BLOCK, Fp8Matrix, GpuWeights, build_gpu_weights, check_sizes
from step3rt.model.tensor_plan import EMBEDDING, wanted_tensors

NORM_SPREAD = 0.1
"""Standard deviation of norm weights around 1."""


def random_gpu_weights(
    config: Step3Config, device: torch.device, *, seed: int = 0, is_fp8: bool = True
) -> GpuWeights:
    """Draws a model.

    Raises:
        ConfigError: the kernels cannot compute a model of these sizes.
    """
    check_sizes(config)
    return build_gpu_weights(_RandomTensors(config, device, seed), is_fp8=is_fp8)


class _RandomTensors:
    """Tensors by name, each from a generator of its own."""

    def __init__(self, config: Step3Config, device: torch.device, seed: int) -> None:
        self.config = config
        self._device = device
        self._seed = seed
        self._shapes = {wanted.name: wanted.shape for wanted in wanted_tensors(config)}

    def plain(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        values = self._draw(name, shape)
        if len(shape) == 1:
            return 1 + NORM_SPREAD * values
        # Rows of unit length: an embedding of one's own size, logits of unit variance.
        return values if name == EMBEDDING else values * shape[1] ** -0.5

    def matrix(self, name: str, expert: int | None = None) -> Fp8Matrix:
        rows, columns = self._shapes[name][-2:]
        values = self._draw(f"{name}/{expert}", (rows, columns)).to(torch.float8_e4m3fn)
        scales = torch.full((rows // BLOCK, columns // BLOCK), columns**-0.5, device=self._device)
        return Fp8Matrix(values, scales)

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """bf16, normally distributed."""
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7]))
        return torch.randn(shape, dtype=torch.bfloat16, device=self._device, generator=generator)
