// The kernel bodies, compiled once per instruction set as those of norm_relu_pool.inl, whose constants they share.

namespace lk {
namespace LK_ISA {

template <typename T>
static void tangent_forward_sums(const NormTangent<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.slabs, slab = item % p.slabs;
    double* sums = p.partial + item * kForwardSums * C;
    for (int64_t c = 0; c < kForwardSums * C; ++c) sums[c] = 0.0;
    for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
      const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
      const T* mean = p.mean + c0;
      T a[kStrip], b[kStrip];
      for (int64_t row = p.height * slab / p.slabs; row < p.height * (slab + 1) / p.slabs; ++row) {
        const int64_t offset = (image * p.height + row) * W * C + c0;
        const T *z = p.z + offset, *z_dot = p.z_dot + offset;
        for (int64_t c = 0; c < n; ++c) a[c] = b[c] = T(0);
        for (int64_t j = 0; j < W; ++j)
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const T v = z_dot[j * C + c];
            a[c] += v;
            b[c] += v * (z[j * C + c] - mean[c]);
          }
        for (int64_t c = 0; c < n; ++c) {
          sums[c0 + c] += double(a[c]);
          sums[C + c0 + c] += double(b[c]);
        }
      }
    }
  }
}

// The value at the maximum of a window whose first pixel is at `corner`, for n channels.
template <typename T>
static inline T at_maximum(const T* corner, int64_t right, int64_t down, int64_t pool, uint8_t place) {
  if (pool == 1) return corner[0];
  const T v0 = corner[0], v1 = corner[right], v2 = corner[down], v3 = corner[down + right];
  const T up = place == 1 ? v1 : v0, low = place == 3 ? v3 : v2;
  return place >= 2 ? low : up;
}

template <typename T, bool kMoves, int64_t kPool>
static void tangent_apply_rows(const NormTangent<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / kPool, w = W / kPool;
  constexpr uint8_t kShut = uint8_t(kPool * kPool);
  for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
    const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
    const T *mean = p.mean + c0, *of_d = p.of_d + c0, *of_z_dot = p.of_z_dot + c0, *level = p.level + c0;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / h, row = item % h;
      const int64_t offset = (image * p.height + row * kPool) * W * C + c0;
      const T *z = p.z + offset, *z_dot = kMoves ? p.z_dot + offset : z;
      T* y_dot = p.y_dot + item * w * C + c0;
      const uint8_t* index = p.index + item * w * C + c0;
      for (int64_t j = 0; j < w; ++j)
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) {
          const uint8_t at = index[j * C + c];
          T v = of_d[c] * (at_maximum(z + kPool * j * C + c, C, W * C, kPool, at) - mean[c]) + level[c];
          if (kMoves) v += of_z_dot[c] * at_maximum(z_dot + kPool * j * C + c, C, W * C, kPool, at);
          y_dot[j * C + c] = at < kShut ? v : T(0);
        }
    }
  }
}

template <typename T>
static void tangent_apply(const NormTangent<T>& p, int64_t begin, int64_t end) {
  if (p.pool == 2)
    p.z_dot != nullptr ? tangent_apply_rows<T, true, 2>(p, begin, end) : tangent_apply_rows<T, false, 2>(p, begin, end);
  else
    p.z_dot != nullptr ? tangent_apply_rows<T, true, 1>(p, begin, end) : tangent_apply_rows<T, false, 1>(p, begin, end);
}

template <typename T, bool kMoves, int64_t kPool>
static void tangent_backward_rows(const NormTangent<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / kPool, w = W / kPool;
  constexpr uint8_t kShut = uint8_t(kPool * kPool);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.slabs, slab = item % p.slabs;
    double* sums = p.partial + item * kBackwardSums * C;
    for (int64_t c = 0; c < kBackwardSums * C; ++c) sums[c] = 0.0;
    for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
      const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
      const T* mean = p.mean + c0;
      T a[kBackwardSums][kStrip];
      for (int64_t row = h * slab / p.slabs; row < h * (slab + 1) / p.slabs; ++row) {
        const int64_t offset = (image * p.height + row * kPool) * W * C + c0, out = (image * h + row) * w * C + c0;
        const T *z = p.z + offset, *z_dot = kMoves ? p.z_dot + offset : z;
        const T *gy = p.gy + out, *gy_dot = p.gy_dot + out;
        const uint8_t* index = p.index + out;
        for (int64_t s = 0; s < kBackwardSums; ++s)
          for (int64_t c = 0; c < n; ++c) a[s][c] = T(0);
        for (int64_t j = 0; j < w; ++j)
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const uint8_t at = index[j * C + c];
            const T d = at_maximum(z + kPool * j * C + c, C, W * C, kPool, at) - mean[c];
            const T g = at < kShut ? gy[j * C + c] : T(0), g_dot = at < kShut ? gy_dot[j * C + c] : T(0);
            a[0][c] += g;
            a[1][c] += g * d;
            a[2][c] += g_dot;
            a[3][c] += g_dot * d;
            if (kMoves) a[4][c] += g * at_maximum(z_dot + kPool * j * C + c, C, W * C, kPool, at);
          }
        for (int64_t s = 0; s < kBackwardSums; ++s)
          for (int64_t c = 0; c < n; ++c) sums[s * C + c0 + c] += double(a[s][c]);
      }
    }
  }
}

template <typename T>
static void tangent_backward_sums(const NormTangent<T>& p, int64_t begin, int64_t end) {
  if (p.pool == 2)
    p.z_dot != nullptr ? tangent_backward_rows<T, true, 2>(p, begin, end)
                       : tangent_backward_rows<T, false, 2>(p, begin, end);
  else
    p.z_dot != nullptr ? tangent_backward_rows<T, true, 1>(p, begin, end)
                       : tangent_backward_rows<T, false, 1>(p, begin, end);
}

template <typename T, bool kMoves, bool kBoth>
static void tangent_dense_rows(const NormTangent<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / p.pool, w = W / p.pool;
  const int64_t bands = (p.height + p.pool - 1) / p.pool;
  for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
    const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
    const T *mean = p.mean + c0, *of_g = p.of_g + c0, *slope = p.slope + c0, *constant = p.constant + c0;
    const T *g_turn = p.g_turn + c0, *d_turn = p.d_turn + c0, *z_dot_turn = p.z_dot_turn + c0;
    const T* constant_turn = p.constant_turn + c0;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / bands, band = item % bands;
      const int64_t row = band * p.pool, rows = p.height - row < p.pool ? p.height - row : p.pool;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < W; ++j) {
          const int64_t at = ((image * p.height + row + r) * W + j) * C + c0, window = j / p.pool;
          const bool pooled = band < h && window < w;
          const int64_t out = pooled ? ((image * h + band) * w + window) * C + c0 : 0;
          const uint8_t here = uint8_t(r * p.pool + j % p.pool);
          const T *z = p.z + at, *z_dot = kMoves ? p.z_dot + at : z;
          T *dz = kBoth ? p.dz + at : nullptr, *dz_dot = p.dz_dot + at;
          if (!pooled) {
#pragma GCC ivdep
            for (int64_t c = 0; c < n; ++c) {
              const T d = z[c] - mean[c];
              if (kBoth) dz[c] = -(constant[c] + slope[c] * d);
              dz_dot[c] = d_turn[c] * d + (kMoves ? z_dot_turn[c] * z_dot[c] : T(0)) + constant_turn[c];
            }
            continue;
          }
          const T *gy = p.gy + out, *gy_dot = p.gy_dot + out;
          const uint8_t* index = p.index + out;
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const T d = z[c] - mean[c];
            const T g = index[c] == here ? gy[c] : T(0), g_dot = index[c] == here ? gy_dot[c] : T(0);
            if (kBoth) dz[c] = of_g[c] * g - (constant[c] + slope[c] * d);
            dz_dot[c] = g_turn[c] * g + of_g[c] * g_dot + d_turn[c] * d + (kMoves ? z_dot_turn[c] * z_dot[c] : T(0)) +
                        constant_turn[c];
          }
        }
    }
  }
}

template <typename T>
static void tangent_dense(const NormTangent<T>& p, int64_t begin, int64_t end) {
  if (p.dz != nullptr)
    p.z_dot != nullptr ? tangent_dense_rows<T, true, true>(p, begin, end)
                       : tangent_dense_rows<T, false, true>(p, begin, end);
  else
    p.z_dot != nullptr ? tangent_dense_rows<T, true, false>(p, begin, end)
                       : tangent_dense_rows<T, false, false>(p, begin, end);
}

extern const NormTangentKernels<float> norm_tangent_f32;
extern const NormTangentKernels<double> norm_tangent_f64;
const NormTangentKernels<float> norm_tangent_f32{tangent_forward_sums<float>, tangent_apply<float>,
                                                 tangent_backward_sums<float>, tangent_dense<float>};
const NormTangentKernels<double> norm_tangent_f64{tangent_forward_sums<double>, tangent_apply<double>,
                                                  tangent_backward_sums<double>, tangent_dense<double>};

}  // namespace LK_ISA
}  // namespace lk
