"""Baselines that only count: a unigram and an interpolated Kneser-Ney trigram over tokens.

Never smooths with held-out counts: the discounts come from the training counts.
"""

import numpy as np


class Unigram:
    """Relative frequencies with one added to each count."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Counts `tokens`, u16[N]."""
        counts = np.bincount(tokens, minlength=vocab_size) + 1.0
        self._log_probability = np.log(counts / counts.sum())

    def log_probability(self, document: np.ndarray) -> np.ndarray:
        """Nats, float64[N-1], for tokens 1… of `document` (its first token is given)."""
        return self._log_probability[document[1:]]


class Trigram:
    """Interpolated Kneser-Ney of order 3, with a discount n1 / (n1 + 2 n2) for each order."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Counts `tokens`, u16[N]; trigrams may span two documents, over the end token."""
        self._vocab_size = vocab_size
        wide = tokens.astype(np.int64)
        trigrams, trigram_counts = np.unique(
            self._key(wide[:-2], wide[1:-1], wide[2:]), return_counts=True
        )
        # Orders below the highest count in how many contexts a token was seen, not how often.
        bigrams, bigram_counts = np.unique(trigrams % vocab_size**2, return_counts=True)
        unigrams = np.bincount(bigrams % vocab_size, minlength=vocab_size) + 1.0
        self._unigram = unigrams / unigrams.sum()
        self._orders = (
            _Discounted(bigrams, bigram_counts, vocab_size),
            _Discounted(trigrams, trigram_counts, vocab_size),
        )

    def log_probability(self, document: np.ndarray) -> np.ndarray:
        """Nats, float64[N-1], for tokens 1… of `document` (its first token is given)."""
        wide = document.astype(np.int64)
        # Token 1 has one token of context: repeated, it is an unseen pair, so the bigram decides.
        before = np.concatenate((wide[:1], wide[:-2]))
        bigram, trigram = self._orders
        probability = bigram.interpolate(self._key(0, wide[:-1], wide[1:]), self._unigram[wide[1:]])
        probability = trigram.interpolate(self._key(before, wide[:-1], wide[1:]), probability)
        return np.log(probability)

    def _key(self, first: np.ndarray | int, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        return (first * self._vocab_size + second) * self._vocab_size + third


class _Discounted:
    """Counts of one order, addressed by key = context * V + token."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self._discount = once / (once + 2 * twice)
        self._keys, self._counts = keys, counts
        self._contexts, starts = np.unique(keys // vocab_size, return_index=True)
        self._totals = np.add.reduceat(counts, starts)
        self._continuations = np.diff(np.append(starts, len(keys)))

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probability of each key, given the probability of the order below for the same token."""
        counts = _lookup(self._keys, self._counts, keys)
        totals = _lookup(self._contexts, self._totals, keys // self._vocab_size)
        continuations = _lookup(self._contexts, self._continuations, keys // self._vocab_size)
        seen = np.maximum(totals, 1)
        discounted = np.maximum(counts - self._discount, 0) / seen
        return np.where(
            totals > 0, discounted + self._discount * continuations / seen * lower, lower
        )


def _lookup(sorted_keys: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, values[at], 0)
