// For comparison: a fused classifier as C programs have it, and a copy past the caches. See plain.py.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// glibc has vectors of it, which GCC uses without -ffast-math if it is told so.
#pragma omp declare simd notinbranch
float expf(float);

// Mean loss of each row, and its gradient: three passes over a row, which the compiler vectorises.
void fused_classifier(float* restrict grad, float* restrict losses, const float* restrict logits,
                      const int64_t* restrict target, int64_t rows, int64_t classes) {
  const float share = 1.0f / (float)rows;
#pragma omp parallel for
  for (int64_t n = 0; n < rows; ++n) {
    const float* x = logits + n * classes;
    float* g = grad + n * classes;
    float max = -INFINITY, sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      max = x[c] > max ? x[c] : max;
    }
    for (int64_t c = 0; c < classes; ++c) {
      g[c] = expf(x[c] - max);
      sum += g[c];
    }
    const float scale = share / sum;
    for (int64_t c = 0; c < classes; ++c) {
      g[c] *= scale;
    }
    g[target[n]] -= share;
    losses[n] = max + logf(sum) - x[target[n]];
  }
}

// Reads and writes each byte once, where a copy through the caches also reads what it overwrites.
void stream_copy(char* restrict to, const char* restrict from, int64_t bytes) {
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < bytes; begin += 1 << 20) {
    const int64_t size = bytes - begin < 1 << 20 ? bytes - begin : 1 << 20;
    int64_t i = 0;
#ifdef __AVX512F__
    for (; (uintptr_t)to % 64 == 0 && i + 64 <= size; i += 64) {
      _mm512_stream_si512((void*)(to + begin + i), _mm512_loadu_si512(from + begin + i));
    }
    _mm_sfence();
#endif
    memcpy(to + begin + i, from + begin + i, size - i);
  }
}
