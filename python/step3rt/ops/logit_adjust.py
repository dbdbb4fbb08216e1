"""Adjusts a sequence's logits: bias, then repetition, frequency and presence penalties.

Owns the counts that the penalties need; it chooses no token, and masks none.
"""

from collections.abc import Sequence

import numpy as np
import torch

_FIRST_CAPACITY = 64


class LogitAdjuster:
    """One sequence's logit bias and penalties, and how often it has generated which token.

    With `bias`, `repetition` > 0, `frequency` and `presence` as the request has them, `count[v]`
    how often token v was generated (the prompt is not counted), the logit z of token v becomes, in
    this order, which is vLLM's:

        z += bias[v]
        z  = z / repetition if z > 0 else z * repetition    if v is in the prompt or generated
        z -= frequency * count[v]
        z -= presence                                       if count[v] > 0

    Finite logits stay finite: what exceeds the range of their type becomes its largest value.

    A step costs as much as there are different tokens to look at, and one token more costs one
    entry: nothing is of the vocabulary's size but the row that `apply` returns.

    Args:
        presence: 0 is off.
        frequency: 0 is off.
        repetition: 1 is off.
        bias: token ids, different from each other and below the vocabulary's size, and one value
            for each.
        token_ids: all known tokens; they come from a client or from an earlier stay elsewhere.
        num_prompt_tokens: how many of them are the prompt's; the others were generated.
    """

    def __init__(
        self,
        *,
        presence: float,
        frequency: float,
        repetition: float,
        bias: tuple[Sequence[int], Sequence[float]],
        token_ids: Sequence[int],
        num_prompt_tokens: int,
    ) -> None:
        self._presence, self._frequency, self._repetition = presence, frequency, repetition
        self._bias_ids = torch.tensor(bias[0], dtype=torch.long)
        self._biases = torch.tensor(bias[1], dtype=torch.float32)
        # _ids[i] was generated _counts[i] times, for i below _num_ids; _index finds i.
        self._ids = np.zeros(_FIRST_CAPACITY, dtype=np.int64)
        self._counts = np.zeros(_FIRST_CAPACITY, dtype=np.int64)
        self._num_ids = 0
        self._index: dict[int, int] = {}
        self._has_penalties = presence != 0 or frequency != 0 or repetition != 1
        if repetition != 1:
            for token_id in token_ids[:num_prompt_tokens]:
                self._add(token_id, 0)
        for token_id in token_ids[num_prompt_tokens:]:
            self.count(token_id)

    def count(self, token_id: int) -> None:
        """Takes note that `token_id` was generated."""
        if self._has_penalties:
            self._add(token_id, 1)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the adjusted logits.

        Args:
            logits: float[V], contiguous; entries of -inf (a masked token) stay so.

        Returns:
            A new tensor of the same shape, type and device.
        """
        adjusted = logits.clone()
        if self._bias_ids.numel():
            ids, biases = self._bias_ids.to(logits.device), self._biases.to(logits)
            adjusted[ids] += biases
        if self._num_ids:
            ids = torch.from_numpy(self._ids[: self._num_ids]).to(logits.device)
            counts = torch.from_numpy(self._counts[: self._num_ids]).to(logits.device)
            adjusted[ids] = self._penalise(adjusted[ids], counts)
        return adjusted

    def _penalise(self, logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        # float64, so that a tiny or large repetition penalty overflows nothing.
        exact = logits.double()
        exact = torch.where(exact > 0, exact / self._repetition, exact * self._repetition)
        exact = exact - self._frequency * counts - self._presence * (counts > 0)
        most = torch.finfo(logits.dtype).max
        bounded = torch.where(torch.isinf(logits), exact, exact.clamp(-most, most))
        return bounded.to(logits.dtype)

    def _add(self, token_id: int, times: int) -> None:
        index = self._index.get(token_id)
        if index is None:
            index = self._index[token_id] = self._num_ids
            if index == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[index] = token_id
            self._num_ids += 1
        self._counts[index] += times
