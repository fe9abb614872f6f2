// Fused multiply-adds and nothing else: bench/floor.py compiles it with -march=native and runs it in every thread.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24;  // of 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;  // of 16
#else
constexpr int kBytes = 16, kChains = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

extern "C" double flops_of(long rounds) { return 2.0 * rounds * kChains * (kBytes / sizeof(float)); }

// Chains that do not wait for one another. The sum is returned so that no compiler leaves them out.
extern "C" float run(long rounds) {
  Vector chains[kChains], factor = Vector{} + 0.999f, term = Vector{} + 1e-3f;
  for (int i = 0; i < kChains; ++i) chains[i] = factor + static_cast<float>(i);
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + term;
  }
  Vector sum = chains[0];
  for (int i = 1; i < kChains; ++i) sum += chains[i];
  return sum[0];
}
