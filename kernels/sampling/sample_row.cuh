// Chooses one token of one row: edits, filters, noise; log-probabilities of the raw logits.
// The function of ops/sampling.py; what may differ from it is said in docs/kernels.md.
//
// Greedy rows without edits and log-probabilities end after one pass over the logits, which stay in
// registers. All others keep their slice in shared memory and never read the row again.
#pragma once

#include "sampling/philox.cuh"
#include "sampling/row_load.cuh"
#include "sampling/select.cuh"

// The largest logit of the row and its first token.
struct RowTop {
  float value;
  int token;
};

__device__ __forceinline__ RowTop unpack_top(uint64_t best) {
  // A row without any logit above -inf has no best: its first token, as argmax says.
  if (best == 0) return {-INFINITY, 0};
  return {key_value(best_key(best)), best_token(best)};
}

__device__ __forceinline__ float thread_largest(const ClusterRow& row) {
  float largest = -INFINITY;
  row.for_each([&](float logit, int) { largest = fmaxf(largest, logit); });
  return largest;
}

// ---- edits ---------------------------------------------------------------------------------

// The first edit of a token at or above `token`.
__device__ __forceinline__ int find_edit(const LogitEdit* edits, int low, int high, int token) {
  while (low < high) {
    const int middle = (low + high) / 2;
    if (edits[middle].token < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Bias in fp32, then the penalties in fp64, as ops/logit_adjust.py; the mask last.
__device__ __forceinline__ float edited(float logit, const LogitEdit& edit,
                                        const SamplingRow& how) {
  logit = __fadd_rn(logit, edit.bias);
  double exact = logit;
  if (edit.flags & kEditIsKnown) {
    exact = exact > 0 ? __ddiv_rn(exact, how.repetition) : __dmul_rn(exact, how.repetition);
  }
  exact = __dsub_rn(exact, __dmul_rn(how.frequency, edit.num_generated));
  if (edit.num_generated > 0) exact = __dsub_rn(exact, how.presence);
  constexpr double kMost = 3.4028234663852886e38;
  if (!isinf(logit)) exact = fmin(fmax(exact, -kMost), kMost);
  return edit.flags & kEditIsMasked ? -INFINITY : __double2float_rn(exact) + 0.0f;
}

__device__ void apply_edits(ClusterRow& row, const SampleParams& params, int index, int count,
                            const SamplingRow& how) {
  const int begin = params.edit_offsets[index], end = params.edit_offsets[index + 1];
  const int first = find_edit(params.edits, begin, end, row.first);
  const int last = find_edit(params.edits, begin, end, row.first + count);
  __syncthreads();
  for (int e = first + threadIdx.x; e < last; e += kSampleThreads) {
    const LogitEdit edit = params.edits[e];
    float& logit = row.shared.slice[edit.token - row.first];
    logit = edited(logit, edit, how);
  }
  __syncthreads();
}

__device__ RowTop find_top(ClusterRow& row) {
  uint64_t best = 0;
  row.for_each([&](float logit, int place) {
    if (logit == -INFINITY) return;
    const uint64_t packed = pack_best(ordered_key(logit), row.first + place);
    best = packed > best ? packed : best;
  });
  return unpack_top(row.reduce_row(best, Largest{}));
}

// ---- log-probabilities ---------------------------------------------------------------------

// ln of the sum of exp over the row.
__device__ double log_sum_exp(ClusterRow& row, RowTop top) {
  float sum = 0.0f;
  row.for_each([&](float logit, int) { sum += expf(logit - top.value); });
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(static_cast<double>(sum)));
  const uint64_t total = row.reduce_row(bits, DoubleSum{});
  return top.value + log(__longlong_as_double(static_cast<int64_t>(total)));
}

// Writes the `how.num_top` most likely tokens, most likely first, of equal ones the lower id.
__device__ void list_top(ClusterRow& row, const SampleParams& params, int index, int num_top,
                         RowTop top, double log_sum) {
  SampleShared& shared = row.shared;
  const float floor = find_floor(row, thread_largest(row), num_top);
  const Cut cut = select(row, ByCount{}, Cut{}, ordered_key(floor), ordered_key(top.value),
                         static_cast<uint64_t>(num_top));
  barrier_cluster_sync();  // the lists of the selection have been read
  if (threadIdx.x == 0) shared.num_listed = 0;
  __syncthreads();
  row.for_each([&](float logit, int place) {
    const uint32_t key = ordered_key(logit);
    if (!cut.keeps(key, row.first + place)) return;
    shared.listed[atomicAdd(&shared.num_listed, 1)] = {key, row.first + place};
  });
  barrier_cluster_sync();
  const int total = gather_lists(row);  // fewer than num_top if the vocabulary ends
  if (row.rank == 0 && static_cast<int>(threadIdx.x) < total) {
    const ListedToken own = shared.gathered[threadIdx.x];
    int place = 0;
    for (int i = 0; i < total; ++i) {
      const ListedToken other = shared.gathered[i];
      place += other.key > own.key || (other.key == own.key && other.token < own.token);
    }
    const int64_t out = static_cast<int64_t>(index) * params.max_top + place;
    params.top_ids[out] = own.token;
    params.top_logprobs[out] = static_cast<float>(key_value(own.key) - log_sum);
  }
  barrier_cluster_sync();  // the lists have been read
}

// ---- filters and noise ---------------------------------------------------------------------

// Which tokens top-k, then top-p, then min-p leave.
__device__ Cut filter(ClusterRow& row, const SamplingRow& how, RowTop top, int vocab_size) {
  const uint32_t high = ordered_key(top.value);
  const float inverse_temperature = fminf(1.0f / how.temperature, 1e38f);
  Cut cut;
  if (how.top_k > 0 && how.top_k < vocab_size) {
    const float floor = find_floor(row, thread_largest(row), how.top_k);
    cut = select(row, ByCount{}, cut, ordered_key(floor), high, static_cast<uint64_t>(how.top_k));
  }
  if (how.top_p < 1.0f) {
    Mass own;
    row.for_each([&](float logit, int place) {
      if (cut.keeps(ordered_key(logit), row.first + place)) {
        const Mass mass = token_mass(logit, top.value, inverse_temperature);
        own.high += mass.high;
        own.low += mass.low;
      }
    });
    const uint64_t total = row.reduce_row(own.total(), Sum{});
    // The tokens below this, V of them at most, have less than the share that may be dropped.
    const float share = (1.0f - how.top_p) * (static_cast<float>(total) / kMassUnits) / vocab_size;
    const float floor = top.value + how.temperature * (logf(share) - 0.01f);
    const double wanted = ceil(how.top_p * static_cast<double>(total));
    const uint64_t target = max(1ull, static_cast<uint64_t>(wanted));
    const ByMass measure{top.value, inverse_temperature};
    cut = select(row, measure, cut, ordered_key(floor), high, target);
  }
  if (how.min_p > 0.0f) {
    // exp(scaled) >= min_p, solved for the logit and rounded up to the next fp32.
    const double least =
        top.value + how.temperature * log(static_cast<double>(fminf(how.min_p, 1.0f)));
    const uint32_t key = ordered_key(__double2float_ru(least) + 0.0f);
    if (key > cut.key) cut = {key, kNoToken};
  }
  return cut;
}

__device__ __forceinline__ uint64_t noise_word(const SamplingRow& how, int token) {
  const PhiloxBlock block = philox(how.seed, how.position, token / kWordsPerBlock);
  const int word = token % kWordsPerBlock;
  return word == 0   ? block.words[0]
         : word == 1 ? block.words[1]
         : word == 2 ? block.words[2]
                     : block.words[3];
}

__device__ __forceinline__ double exact_score(float logit, int token, const SamplingRow& how,
                                              RowTop top) {
  return __ddiv_rn(__dsub_rn(logit, top.value), how.temperature) + noise(noise_word(how, token));
}

struct Scores {
  float best = -INFINITY;
  float second = -INFINITY;
  int place = 0;

  __device__ __forceinline__ void add(float score, int at) {
    second = fmaxf(second, fminf(score, best));
    if (score > best) {
      best = score;
      place = at;
    }
  }
};

// Estimated scores of all kept tokens, then exact ones of those that may be the largest.
__device__ int draw(ClusterRow& row, const SamplingRow& how, RowTop top, Cut cut) {
  SampleShared& shared = row.shared;
  const float inverse_temperature = fminf(1.0f / how.temperature, 1e38f);
  if (threadIdx.x == 0) {
    shared.exact_key = 0;
    shared.exact_token = kNoToken;
    shared.top_noise = noise_estimate(noise_word(how, top.token));
  }
  __syncthreads();
  // The top token, which is always kept, has this score: others below it need not be looked at, and
  // those that even the most noise does not lift to it need no noise.
  const float bound = shared.top_noise - 2 * kNoiseError;
  const float hopeless = top.value - (kMostNoise - bound + 1.0f) * how.temperature;
  if (ordered_key(hopeless) > cut.key) cut = {ordered_key(hopeless), kNoToken};
  const float least = key_value(cut.key);
  // ln u <= u - 1: where 1 - u exceeds exp(scaled - bound), the noise does not suffice. Both in
  // units of 2^-32, with a margin for rounding.
  constexpr float kLog2E = 1.4426950408889634f;
  const float offset = fmaf(-bound, kLog2E, 32.001f);
  Scores scores;
  row.for_each_four([&](float4 logits, int place) {
    const float values[kWordsPerBlock] = {logits.x, logits.y, logits.z, logits.w};
    if (fmaxf(fmaxf(logits.x, logits.y), fmaxf(logits.z, logits.w)) < least) return;
    const PhiloxBlock block =
        philox(how.seed, how.position, static_cast<uint32_t>(row.first + place) / kWordsPerBlock);
#pragma unroll
    for (int i = 0; i < kWordsPerBlock; ++i) {
      const float scaled = (values[i] - top.value) * inverse_temperature;
      const uint32_t enough = __float2uint_ru(ex2_approx(fmaf(scaled, kLog2E, offset)));
      if (static_cast<uint32_t>(~block.words[i] >> 32) > enough) continue;
      if (cut.keeps(ordered_key(values[i]), row.first + place + i)) {
        scores.add(scaled + noise_estimate(block.words[i]), place + i);
      }
    }
  });
  const uint64_t best = row.reduce_row(ordered_key(scores.best), Largest{});
  const float threshold = key_value(static_cast<uint32_t>(best)) - 2 * kNoiseError;
  // Nearly always one thread, and one token of it.
  uint64_t exact = 0;
  int token = kNoToken;
  if (scores.best >= threshold) {
    const auto consider = [&](float logit, int place) {
      const uint64_t key = ordered_key(exact_score(logit, row.first + place, how, top));
      if (key > exact) {
        exact = key;
        token = row.first + place;
      }
    };
    if (scores.second < threshold) {
      consider(shared.slice[scores.place], scores.place);
    } else {
      row.for_each([&](float logit, int place) {
        if (cut.keeps(ordered_key(logit), row.first + place)) consider(logit, place);
      });
    }
    atomicMax(&shared.exact_key, exact);
  }
  __syncthreads();
  if (token != kNoToken && exact == shared.exact_key) atomicMin(&shared.exact_token, token);
  __syncthreads();
  exact = shared.exact_key;
  const uint4* slots =
      row.exchange(make_uint4(static_cast<uint32_t>(exact), static_cast<uint32_t>(exact >> 32),
                              static_cast<uint32_t>(shared.exact_token), 0));
  exact = 0;
  for (int r = 0; r < kRowCtas; ++r) {  // in the order of tokens: of equals the first stays
    const uint64_t other = slots[r].x | static_cast<uint64_t>(slots[r].y) << 32;
    if (other > exact) {
      exact = other;
      token = static_cast<int>(slots[r].z);
    }
  }
  return token;
}

// ---- the row -------------------------------------------------------------------------------

template <class Format>
__device__ void sample_row(const SampleParams& params, SampleShared& shared) {
  const int index = blockIdx.x / kRowCtas;
  ClusterRow row{shared, cluster_ctarank(), 0, params.slice_tokens};
  row.announce();
  row.first = row.rank * row.length;
  const int count = min(max(params.vocab_size - row.first, 0), row.length);
  const SamplingRow how = params.rows[index];
  const bool has_edits = params.edit_offsets[index] != params.edit_offsets[index + 1];
  const bool is_sampled = how.temperature > 0.0f;
  const bool keeps_copy = is_sampled || has_edits || how.num_top >= 0;
  constexpr int kBytes = 16 / Format::kWidth;
  const char* logits = static_cast<const char*>(params.logits) + index * params.row_stride * kBytes;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const SliceSummary summary = load_slice<Format>(
      row, reinterpret_cast<const uint4*>(logits + static_cast<int64_t>(row.first) * kBytes), count,
      keeps_copy);
  row.meet();
  const uint4* slots =
      row.exchange(make_uint4(static_cast<uint32_t>(summary.best),
                              static_cast<uint32_t>(summary.best >> 32), summary.is_finite, 0));
  uint64_t best = 0;
  bool is_finite = true;
#pragma unroll
  for (int r = 0; r < kRowCtas; ++r) {
    const uint64_t other = slots[r].x | static_cast<uint64_t>(slots[r].y) << 32;
    best = other > best ? other : best;
    is_finite = is_finite && slots[r].z != 0;
  }
  RowTop top = unpack_top(best);
  int token = top.token;
  float logprob = __uint_as_float(0x7fc00000u);
  if (is_finite && keeps_copy) {
    const RowTop raw = top;
    double log_sum = 0.0;
    if (how.num_top >= 0) log_sum = log_sum_exp(row, raw);
    if (how.num_top > 0) list_top(row, params, index, how.num_top, raw, log_sum);
    if (has_edits) {
      apply_edits(row, params, index, count, how);
      top = find_top(row);
      token = top.token;
    }
    // Everything masked: the first token, as the reference.
    if (is_sampled && top.value > -INFINITY) {
      token = draw(row, how, top, filter(row, how, top, params.vocab_size));
    }
    if (how.num_top >= 0) {
      logprob = static_cast<float>(Format::load_one(logits, token) - log_sum);
    }
    // No CTA ends while another may read its shared memory.
    barrier_cluster_arrive_relaxed();
    barrier_cluster_wait();
  }
  if (row.rank == 0 && threadIdx.x == 0) {
    params.token_ids[index] = token;
    params.is_corrupt[index] = !is_finite;
    params.logprobs[index] = logprob;
  }
}
