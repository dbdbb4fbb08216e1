"""The ways in which the FP8 linear kernel can cut a product.

Owns the tile shapes and what follows from them; never decides which one a product gets.
"""

from dataclasses import dataclass

from step3rt.ops.quantize import GROUP_SIZE

_MMA_ROWS = 64
_WARPGROUP_THREADS = 128
_SHARED_ALIGNMENT = 1024
_BARRIER_BYTES = 8


@dataclass(frozen=True, slots=True)
class LinearVariant:
    """How the kernel cuts a product.

    A CTA computes `tile_m` tokens x `tile_n` outputs over 1 / `split` of K; `cast` CTAs of
    neighbouring outputs read their rows once, together, `share` CTAs of neighbouring tokens their
    weights. `stages` of the ring; `ctas_per_sm` that
    may share an SM, so that one launch starts where the last one drains. A warpgroup runs through
    `chunk` blocks of K with one product always ahead of the one it scales; 0: with none ahead.
    """

    tile_m: int
    tile_n: int
    split: int
    cast: int
    stages: int
    ctas_per_sm: int = 1
    chunk: int = 4
    share: int = 1

    @property
    def cluster_ctas(self) -> int:
        """CTAs of a cluster."""
        return self.split * self.cast * self.share

    @property
    def num_threads(self) -> int:
        """Threads of a CTA: one math warpgroup per 64 rows, two at most, and the producer's."""
        return (min(2, self.tile_m // _MMA_ROWS) + 1) * _WARPGROUP_THREADS

    @property
    def shared_bytes(self) -> int:
        """Size of the kernel's struct Shared."""
        ring = self.stages * (self.tile_m + self.tile_n) * GROUP_SIZE
        units = -(-self.tile_m * self.tile_n // 512 // self.split) * self.split
        partial = units * 2048 if self.split > 1 else 0
        sides = 1 if GROUP_SIZE % self.tile_n == 0 else 2
        scales = self.stages * sides * self.tile_m * 4
        total = max(ring, partial) + scales + (2 * self.stages + 1) * _BARRIER_BYTES
        return -(-total // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options that select this variant."""
        values = {
            "TILE_M": self.tile_m,
            "TILE_N": self.tile_n,
            "SPLIT": self.split,
            "CAST": self.cast,
            "STAGES": self.stages,
            "CTAS_PER_SM": self.ctas_per_sm,
            "CHUNK": self.chunk,
            "SHARE": self.share,
        }
        return tuple(f"-DSTEP3RT_{name}={value}" for name, value in values.items())

    def num_ctas(self, num_tokens: int, num_outputs: int) -> int:
        """Grid size."""
        return self.num_tiles_m(num_tokens) * (num_outputs // self.tile_n) * self.split

    def num_tiles_m(self, num_tokens: int) -> int:
        """Tiles that cover the tokens, in whole groups of `share`."""
        return -(-num_tokens // (self.tile_m * self.share)) * self.share

    def fits(self, num_outputs: int, num_inputs: int) -> bool:
        """Whether whole clusters cover a weight of that shape."""
        return (
            num_outputs % (self.tile_n * self.cast) == 0 and num_inputs // GROUP_SIZE >= self.split
        )
