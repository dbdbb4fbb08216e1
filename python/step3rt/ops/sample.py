"""Chooses tokens on the GPU: the function of `ops.sampling` as one kernel launch per batch.

Launches kernels/sampling, on the CPU runs `ops.sample_reference`; keeps no state between steps and
counts no tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.sample_reference import IS_KNOWN, IS_MASKED, sample_row

ROW_CTAS = 8
MAX_TOP = 32
"""Most tokens that a row can list."""
MAX_SLICE_TOKENS = 16376
"""Of one CTA: its share of shared memory, and few enough for 32-bit sums of probabilities."""
MAX_VOCAB_SIZE = ROW_CTAS * MAX_SLICE_TOKENS

_THREADS = 256
_VECTOR_BYTES = 16
_SLICE_ALIGNMENT = 8
_FIXED_SHARED_BYTES = 11264
_SOURCES = {
    torch.bfloat16: "sampling/sm90_bf16_sample.cu",
    torch.float32: "sampling/sm90_f32_sample.cu",
}
_GREEDY_ROW_CTAS = 8
_GREEDY_KERNELS = {
    dtype: launch.Kernel(
        source.replace("_sample.cu", "_sample_greedy.cu"), num_threads=256, is_dependent=True
    )
    for dtype, source in _SOURCES.items()
}

# struct SamplingRow of kernels/sampling/cluster_row.cuh.
_ROW_DTYPE = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("top_k", np.int32),
        ("num_top", np.int32),
        ("seed", np.uint64),
        ("position", np.uint64),
    ],
    align=True,
)

# struct LogitEdit.
_EDIT_DTYPE = np.dtype(
    [
        ("token", np.int32),
        ("num_generated", np.int32),
        ("bias", np.float32),
        ("flags", np.int32),
    ],
    align=True,
)

# struct SampleParams.
_PARAMS_DTYPE = np.dtype(
    [
        ("logits", np.uint64),
        ("rows", np.uint64),
        ("edit_offsets", np.uint64),
        ("edits", np.uint64),
        ("token_ids", np.uint64),
        ("is_corrupt", np.uint64),
        ("logprobs", np.uint64),
        ("top_ids", np.uint64),
        ("top_logprobs", np.uint64),
        ("row_stride", np.int64),
        ("vocab_size", np.int32),
        ("slice_tokens", np.int32),
        ("max_top", np.int32),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSamplingRow:
    """How to choose one row's token; the words mean what they mean in `ops.sampling`.

    All reals are fp32. `generated` maps token ids to how often they were generated;
    `prompt_token_ids` matter to `repetition` alone. num_top: most likely tokens to list, None for
    no log-probability at all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)
    generated: Mapping[int, int] = field(default_factory=dict)
    prompt_token_ids: Sequence[int] = ()
    masked_token_ids: Sequence[int] = ()
    num_top: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """R rows as the kernel reads them, on the device; `pack_rows` makes it.

    rows: u8[R, 48]. edit_offsets: i32[R + 1]. edits: u8[E, 16], at least one. num_top: most listed
    tokens of a row. is_greedy: of every row the largest logit is wanted, and nothing else.
    """

    rows: torch.Tensor
    edit_offsets: torch.Tensor
    edits: torch.Tensor
    num_top: int
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Samples:
    """Results of R rows on the device.

    token_ids i32[R]. is_corrupt i32[R]: not 0 if a logit is not finite; the token is then a largest
    logit's. logprobs f32[R]: NaN where not asked for, or corrupt. top_ids i32[R, N] and
    top_logprobs f32[R, N]: the first `num_top` of a row are written, most likely first.
    """

    token_ids: torch.Tensor
    is_corrupt: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, num_top: int, device: torch.device) -> "Samples":
        """Allocates room for `num_rows` rows that list `num_top` tokens at most."""
        return cls(
            torch.empty(num_rows, dtype=torch.int32, device=device),
            torch.empty(num_rows, dtype=torch.int32, device=device),
            torch.empty(num_rows, device=device),
            torch.empty(num_rows, num_top, dtype=torch.int32, device=device),
            torch.empty(num_rows, num_top, device=device),
        )


def pack_rows(
    rows: Sequence[DeviceSamplingRow], vocab_size: int, device: torch.device
) -> SamplingBatch:
    """Writes rows as the kernel reads them and copies them to the device.

    A row costs 48 bytes, and 16 for every different token that its penalties, bias or mask touch.

    Raises:
        ValueError: a row lists more than `MAX_TOP` tokens, or touches a token outside the
            vocabulary.
    """
    packed = np.zeros(len(rows), dtype=_ROW_DTYPE)
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    edits = []
    for index, row in enumerate(rows):
        if (row.num_top or 0) > MAX_TOP:
            raise ValueError(
                f"Row {index} lists {row.num_top} tokens, the kernel {MAX_TOP} at most. Ask for "
                "fewer."
            )
        for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition"):
            packed[name][index] = getattr(row, name)
        packed["top_k"][index] = row.top_k
        packed["num_top"][index] = -1 if row.num_top is None else row.num_top
        packed["seed"][index] = row.seed
        packed["position"][index] = row.position
        edits.append(_edits(row, index, vocab_size))
        offsets[index + 1] = offsets[index] + len(edits[-1])
    if offsets[-1] == 0:
        edits.append(np.zeros(1, dtype=_EDIT_DTYPE))  # an address to pass
    table = np.concatenate(edits)
    return SamplingBatch(
        rows=torch.from_numpy(packed.view(np.uint8).reshape(len(rows), -1)).to(device),
        edit_offsets=torch.from_numpy(offsets).to(device),
        edits=torch.from_numpy(table.view(np.uint8).reshape(len(table), -1)).to(device),
        num_top=max((row.num_top or 0 for row in rows), default=0),
        is_greedy=offsets[-1] == 0
        and all(row.temperature == 0 and row.num_top is None for row in rows),
    )


def sample_on_device(
    logits: torch.Tensor,
    batch: SamplingBatch,
    out: Samples,
) -> None:
    """Chooses one token per row.

    Args:
        logits: bf16 or f32[R, V]; rows aligned to 16 bytes and as far apart as V rounded up to a
            multiple of 8 at least, so that the last 16 bytes of a row may be read whole.
        batch: R rows; older than the previous kernel of the stream.
        out: Where the results go; room for `batch.num_top` listed tokens.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    device = logits.device
    if logits.dtype not in _SOURCES:
        raise ValueError(f"`logits` is {logits.dtype}, the kernel takes bf16 or f32. Convert it.")
    num_rows, vocab_size = logits.shape
    if not 0 < vocab_size <= MAX_VOCAB_SIZE or num_rows == 0:
        raise ValueError(
            f"`logits` is {num_rows}x{vocab_size}. The kernel takes one row or more of up to "
            f"{MAX_VOCAB_SIZE} tokens. Skip it for an empty batch."
        )
    row_bytes = logits.stride(0) * logits.element_size()
    least = -(-vocab_size // _SLICE_ALIGNMENT) * _SLICE_ALIGNMENT
    is_padded = num_rows == 1 or logits.stride(0) >= least
    is_aligned = row_bytes % _VECTOR_BYTES == 0 and logits.data_ptr() % _VECTOR_BYTES == 0
    if not (is_padded and is_aligned) or logits.stride(1) != 1:
        raise ValueError(
            f"`logits` has strides {list(logits.stride())} at {logits.data_ptr():#x}. The kernel "
            f"reads 16 bytes at a time. Let the head write rows {least} logits apart or more."
        )
    launch.check_tensor("rows", batch.rows, (num_rows, _ROW_DTYPE.itemsize), torch.uint8, device)
    launch.check_tensor("edit_offsets", batch.edit_offsets, (num_rows + 1,), torch.int32, device)
    launch.check_tensor("edits", batch.edits, (-1, _EDIT_DTYPE.itemsize), torch.uint8, device)
    max_top = out.top_ids.shape[1]
    if max_top < batch.num_top:
        raise ValueError(
            f"`out` has room for {max_top} listed tokens of a row, the batch asks for "
            f"{batch.num_top}. Allocate more."
        )
    for name, dtype, shape in (
        ("token_ids", torch.int32, (num_rows,)),
        ("is_corrupt", torch.int32, (num_rows,)),
        ("logprobs", torch.float32, (num_rows,)),
        ("top_ids", torch.int32, (num_rows, max_top)),
        ("top_logprobs", torch.float32, (num_rows, max_top)),
    ):
        launch.check_tensor(name, getattr(out, name), shape, dtype, device)
    if device.type == "cpu":
        _sample_on_cpu(logits, batch, out)
        return
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    params["logits"] = logits.data_ptr()
    for source, names in ((batch, ("rows", "edit_offsets", "edits")), (out, Samples.__slots__)):
        for name in names:
            params[name] = getattr(source, name).data_ptr()
    params["row_stride"] = logits.stride(0)
    params["vocab_size"] = vocab_size
    params["max_top"] = max_top
    row_ctas = _GREEDY_ROW_CTAS if batch.is_greedy else ROW_CTAS
    slice_tokens = -(-vocab_size // (row_ctas * _SLICE_ALIGNMENT)) * _SLICE_ALIGNMENT
    params["slice_tokens"] = slice_tokens
    kernel = (
        _GREEDY_KERNELS[logits.dtype] if batch.is_greedy else _kernel(logits.dtype, slice_tokens)
    )
    kernel.launch(device, num_rows * row_ctas, (params,))


def _sample_on_cpu(logits: torch.Tensor, batch: SamplingBatch, out: Samples) -> None:
    rows = batch.rows.numpy().reshape(-1).view(_ROW_DTYPE)
    edits = batch.edits.numpy().reshape(-1).view(_EDIT_DTYPE)
    offsets = batch.edit_offsets.tolist()
    for index, row in enumerate(rows):
        result = sample_row(logits[index], row, edits[offsets[index] : offsets[index + 1]])
        out.token_ids[index] = result.token_id
        out.is_corrupt[index] = result.is_corrupt
        out.logprobs[index] = result.logprob
        for place, (token_id, logprob) in enumerate(result.top):
            out.top_ids[index, place] = token_id
            out.top_logprobs[index, place] = logprob


@functools.cache
def _kernel(dtype: torch.dtype, slice_tokens: int) -> launch.Kernel:
    return launch.Kernel(
        _SOURCES[dtype],
        num_threads=_THREADS,
        shared_bytes=_FIXED_SHARED_BYTES + slice_tokens * 4,
        is_dependent=True,
    )


def _edits(
    row: DeviceSamplingRow, index: int, vocab_size: int
) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The row's edits, by token."""
    known = set(row.generated)
    if row.repetition != 1:
        known.update(row.prompt_token_ids)
    has_penalties = row.presence != 0 or row.frequency != 0 or row.repetition != 1
    if not has_penalties:
        known.clear()
    masked = {token for token in row.masked_token_ids if token < vocab_size}
    tokens = sorted(known | masked | set(row.bias))
    if tokens and not 0 <= tokens[0] <= tokens[-1] < vocab_size:
        raise ValueError(
            f"Row {index} touches tokens {tokens[0]} to {tokens[-1]}, the vocabulary has "
            f"{vocab_size}. Check the request's ids against the vocabulary."
        )
    edits = np.zeros(len(tokens), dtype=_EDIT_DTYPE)
    for place, token in enumerate(tokens):
        edits[place] = (
            token,
            row.generated.get(token, 0) if has_penalties else 0,
            row.bias.get(token, 0.0),
            (IS_KNOWN if token in known else 0) | (IS_MASKED if token in masked else 0),
        )
    return edits
