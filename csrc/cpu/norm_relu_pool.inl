// The kernel bodies, compiled once per instruction set: the including file sets LK_ISA and the target pragma.
// No standard header may be included below that pragma: its inline functions would be shared between instruction sets.

namespace lk {
namespace LK_ISA {

constexpr int64_t kBlockElements = 4096;  // a block is read twice while it lies in the first-level cache
constexpr int64_t kStrip = 512;           // channels handled at a time, bounds the stack buffers

template <typename T>
static void moments(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.slabs, slab = item % p.slabs;
    const int64_t first = p.height * slab / p.slabs, last = p.height * (slab + 1) / p.slabs;
    const int64_t pixels = (last - first) * p.width;
    const T* base = p.z + (image * p.height + first) * p.width * C;
    double* mean = p.partial + item * 2 * C;
    double* m2 = mean + C;
    for (int64_t c = 0; c < C; ++c) mean[c] = m2[c] = 0.0;
    const int64_t strip = C < kStrip ? C : kStrip;
    const int64_t block = kBlockElements / strip > 1 ? kBlockElements / strip : 1;
    for (int64_t c0 = 0; c0 < C; c0 += strip) {
      const int64_t n = C - c0 < strip ? C - c0 : strip;
      T sum[kStrip], rest[kStrip], square[kStrip];
      for (int64_t from = 0; from < pixels; from += block) {
        const int64_t count = pixels - from < block ? pixels - from : block;
        const T* z = base + from * C + c0;
        for (int64_t c = 0; c < n; ++c) sum[c] = rest[c] = square[c] = T(0);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < n; ++c) sum[c] += z[i * C + c];
        const T share = T(1) / T(count);
        for (int64_t c = 0; c < n; ++c) sum[c] *= share;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < n; ++c) {
            const T d = z[i * C + c] - sum[c];
            rest[c] += d;
            square[c] += d * d;
          }
        // The block's mean is sum + rest / count, `rest` being what rounding left (Chan, Golub, LeVeque 1983, eq. 1.7).
        const double part = 1.0 / double(count);
        // The same paper: join (from, mean, m2) with (count, mean and m2 of the block).
        const double weight = double(count) / double(from + count), cross = double(from) * weight;
        for (int64_t c = 0; c < n; ++c) {
          const double shift = double(rest[c]) * part;
          const double delta = double(sum[c]) + shift - mean[c0 + c];
          mean[c0 + c] += delta * weight;
          m2[c0 + c] += double(square[c]) - double(rest[c]) * shift + delta * delta * cross;
        }
      }
    }
  }
}

template <typename T>
static void merge_moments(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, parts = p.images * p.slabs;
  for (int64_t task = begin; task < end; ++task) {
    double* mean = p.partial + task * parts * 2 * C;
    double* m2 = mean + C;
    double seen = 0.0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t slab = part % p.slabs;
      const int64_t rows = p.height * (slab + 1) / p.slabs - p.height * slab / p.slabs;
      const double count = double(rows * p.width);
      if (part > 0 && count > 0) {
        const double weight = count / (seen + count), cross = seen * weight;
        const double* other = mean + part * 2 * C;
        for (int64_t c = 0; c < C; ++c) {
          const double delta = other[c] - mean[c];
          mean[c] += delta * weight;
          m2[c] += other[C + c] + delta * delta * cross;
        }
      }
      seen += count;
    }
    for (int64_t c = 0; c < C; ++c) {
      p.mean[task * C + c] = T(mean[c]);
      p.rstd[task * C + c] = T(1.0 / __builtin_sqrt(m2[c] / seen + p.eps));
    }
  }
}

// A NaN survives both comparisons, as it does in torch's ReLU and max-pool.
template <typename T>
static inline T relu(T v) {
  return v < T(0) ? T(0) : v;
}

template <typename T>
static void apply(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / p.pool, w = W / p.pool;
  for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
    const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
    T scale[kStrip];
    const T *mean = p.mean, *beta = p.beta;
    int64_t ready = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / h, row = item % h, task = image / p.images;
      if (task != ready) {
        const T* gamma = p.gamma + task * p.gamma_task + c0;
        const T* rstd = p.rstd + task * C + c0;
        beta = p.beta + task * p.beta_task + c0;
        mean = p.mean + task * C + c0;
        for (int64_t c = 0; c < n; ++c) scale[c] = gamma[c] * rstd[c];
        ready = task;
      }
      const T* z = p.z + (image * p.height + row * p.pool) * W * C + c0;
      T* y = p.y + item * w * C + c0;
      uint8_t* index = p.index + item * w * C + c0;
      if (p.pool == 1) {
        for (int64_t j = 0; j < w; ++j)
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const T v = (z[j * C + c] - mean[c]) * scale[c] + beta[c];
            y[j * C + c] = relu(v);
            index[j * C + c] = v <= T(0) ? 1 : 0;
          }
        continue;
      }
      for (int64_t j = 0; j < w; ++j) {
        const T* z0 = z + 2 * j * C;
        const T* z1 = z0 + W * C;
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) {
          const T m = mean[c], a = scale[c], b = beta[c];
          const T v0 = (z0[c] - m) * a + b, v1 = (z0[C + c] - m) * a + b;
          const T v2 = (z1[c] - m) * a + b, v3 = (z1[C + c] - m) * a + b;
          const bool right = v1 > v0, low_right = v3 > v2;
          const T up = right ? v1 : v0, low = low_right ? v3 : v2;
          const uint8_t at_up = right ? 1 : 0, at_low = low_right ? 3 : 2;
          const bool below = low > up;
          const T best = below ? low : up;
          const uint8_t at = below ? at_low : at_up;
          y[j * C + c] = relu(best);
          index[j * C + c] = best <= T(0) ? 4 : at;
        }
      }
    }
  }
}

template <typename T>
static void settle(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, h = p.height / p.pool, w = p.width / p.pool;
  for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
    const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
    T scale[kStrip], level[kStrip];
    const T* beta = p.beta;
    int64_t ready = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t task = item / (h * p.images);
      if (task != ready) {
        const T* gamma = p.gamma + task * p.gamma_task + c0;
        beta = p.beta + task * p.beta_task + c0;
        for (int64_t c = 0; c < n; ++c) {
          const T sign = gamma[c] < T(0) ? T(-1) : T(1);
          scale[c] = sign * gamma[c] * p.rstd[task * C + c0 + c];
          level[c] = sign * p.mean[task * C + c0 + c];
        }
        ready = task;
      }
      T* y = p.y + item * w * C + c0;
      for (int64_t j = 0; j < w; ++j, y += C)
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) y[c] = relu((y[c] - level[c]) * scale[c] + beta[c]);
    }
  }
}

template <typename T>
static void reduce(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / p.pool, w = W / p.pool;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.slabs, slab = item % p.slabs, task = image / p.images;
    double* dgamma = p.partial + item * 2 * C;
    double* dbeta = dgamma + C;
    for (int64_t c = 0; c < 2 * C; ++c) dgamma[c] = 0.0;
    for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
      const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
      const T* mean = p.mean + task * C + c0;
      T a[kStrip], b[kStrip];
      for (int64_t row = h * slab / p.slabs; row < h * (slab + 1) / p.slabs; ++row) {
        const T* z = p.z + (image * p.height + row * p.pool) * W * C + c0;
        const T* gy = p.gy + (image * h + row) * w * C + c0;
        const uint8_t* index = p.index + (image * h + row) * w * C + c0;
        for (int64_t c = 0; c < n; ++c) a[c] = b[c] = T(0);
        for (int64_t j = 0; j < w; ++j) {
          const T* z0 = z + p.pool * j * C;
          if (p.pool == 1) {
#pragma GCC ivdep
            for (int64_t c = 0; c < n; ++c) {
              const T g = index[j * C + c] == 0 ? gy[j * C + c] : T(0);
              a[c] += g * (z0[c] - mean[c]);
              b[c] += g;
            }
            continue;
          }
          const T* z1 = z0 + W * C;
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const uint8_t at = index[j * C + c];
            const T v0 = z0[c], v1 = z0[C + c], v2 = z1[c], v3 = z1[C + c];
            const T up = at == 1 ? v1 : v0, low = at == 3 ? v3 : v2;
            const T v = at >= 2 ? low : up;
            const T g = at < 4 ? gy[j * C + c] : T(0);
            a[c] += g * (v - mean[c]);
            b[c] += g;
          }
        }
        for (int64_t c = 0; c < n; ++c) {
          dgamma[c0 + c] += double(a[c]);
          dbeta[c0 + c] += double(b[c]);
        }
      }
    }
  }
}

template <typename T>
static void merge_reduce(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, parts = p.images * p.slabs;
  for (int64_t task = begin; task < end; ++task) {
    double* dgamma = p.partial + task * parts * 2 * C;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t c = 0; c < 2 * C; ++c) dgamma[c] += dgamma[part * 2 * C + c];
    for (int64_t c = 0; c < C; ++c) {
      p.dgamma[task * C + c] = T(dgamma[c] * double(p.rstd[task * C + c]));
      p.dbeta[task * C + c] = T(dgamma[C + c]);
    }
  }
}

// dz = gamma rstd (g - dbeta / M - xhat dgamma / M), M = images height width, g = gy at the window's maximum, else 0.
template <typename T>
static void dense(const NormReluPool<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / p.pool, w = W / p.pool;
  const int64_t bands = (p.height + p.pool - 1) / p.pool;
  const double share = 1.0 / double(p.images * p.height * W);
  for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
    const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
    T scale[kStrip], level[kStrip], slope[kStrip];
    const T* mean = p.mean;
    int64_t ready = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / bands, band = item % bands, task = image / p.images;
      if (task != ready) {
        const T* gamma = p.gamma + task * p.gamma_task + c0;
        const T* rstd = p.rstd + task * C + c0;
        mean = p.mean + task * C + c0;
        for (int64_t c = 0; c < n; ++c) {
          const double a = double(gamma[c]) * double(rstd[c]);
          scale[c] = T(a);
          level[c] = T(a * share * double(p.dbeta[task * C + c0 + c]));
          slope[c] = T(a * share * double(rstd[c]) * double(p.dgamma[task * C + c0 + c]));
        }
        ready = task;
      }
      const int64_t row = band * p.pool, rows = p.height - row < p.pool ? p.height - row : p.pool;
      const int64_t offset = (image * p.height + row) * W * C + c0;
      const bool pooled = band < h;
      for (int64_t r = 0; r < rows; ++r) {
        const T* z = p.z + offset + r * W * C;
        T* dz = p.dz + offset + r * W * C;
        for (int64_t j = 0; j < W; ++j) {
          const int64_t window = j / p.pool;
          if (!pooled || window >= w) {
#pragma GCC ivdep
            for (int64_t c = 0; c < n; ++c) dz[j * C + c] = -(level[c] + slope[c] * (z[j * C + c] - mean[c]));
            continue;
          }
          const int64_t at = ((image * h + band) * w + window) * C + c0;
          const T* gy = p.gy + at;
          const uint8_t* index = p.index + at;
          const uint8_t here = uint8_t(r * p.pool + j % p.pool);
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const T g = index[c] == here ? gy[c] : T(0);
            dz[j * C + c] = scale[c] * g - (level[c] + slope[c] * (z[j * C + c] - mean[c]));
          }
        }
      }
    }
  }
}

template <typename T>
static void reduce_grad_grad(const NormReluPoolGradGrad<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / p.pool, w = W / p.pool;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.slabs, slab = item % p.slabs, task = image / p.images;
    double* sums = p.partial + item * 5 * C;
    for (int64_t c = 0; c < 5 * C; ++c) sums[c] = 0.0;
    for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
      const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
      const T* mean = p.mean + task * C + c0;
      T a[kStrip], b[kStrip], d[kStrip];
      for (int64_t row = p.height * slab / p.slabs; p.v != nullptr && row < p.height * (slab + 1) / p.slabs; ++row) {
        const int64_t offset = (image * p.height + row) * W * C + c0;
        const T *z = p.z + offset, *v = p.v + offset;
        for (int64_t c = 0; c < n; ++c) a[c] = b[c] = T(0);
        for (int64_t j = 0; j < W; ++j)
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            a[c] += v[j * C + c];
            b[c] += v[j * C + c] * (z[j * C + c] - mean[c]);
          }
        for (int64_t c = 0; c < n; ++c) {
          sums[c0 + c] += double(a[c]);
          sums[C + c0 + c] += double(b[c]);
        }
      }
      for (int64_t row = h * slab / p.slabs; row < h * (slab + 1) / p.slabs; ++row) {
        const int64_t offset = (image * p.height + row * p.pool) * W * C + c0;
        const T* gy = p.gy + (image * h + row) * w * C + c0;
        const uint8_t* index = p.index + (image * h + row) * w * C + c0;
        for (int64_t c = 0; c < n; ++c) a[c] = b[c] = d[c] = T(0);
        for (int64_t j = 0; j < w; ++j)
          for (int64_t place = 0; place < p.pool * p.pool; ++place) {
            const int64_t at = offset + (place / p.pool * W + p.pool * j + place % p.pool) * C;
            const T* z = p.z + at;
            const T* v = p.v != nullptr ? p.v + at : z;
            const uint8_t here = uint8_t(place);
#pragma GCC ivdep
            for (int64_t c = 0; c < n; ++c) {
              const T g = index[j * C + c] == here ? gy[j * C + c] : T(0);
              a[c] += g;
              b[c] += g * (z[c] - mean[c]);
              d[c] += g * v[c];
            }
          }
        for (int64_t c = 0; c < n; ++c) {
          sums[2 * C + c0 + c] += double(a[c]);
          sums[3 * C + c0 + c] += double(b[c]);
          sums[4 * C + c0 + c] += p.v != nullptr ? double(d[c]) : 0.0;
        }
      }
    }
  }
}

// The sums become averages with xhat in place of z - mean; the fifth one becomes the average of P(v) g, where
// P(u) = u - mean(u) - xhat mean(u xhat).
template <typename T>
static void merge_grad_grad(const NormReluPoolGradGrad<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, parts = p.images * p.slabs;
  const double values = double(p.images * p.height * p.width);
  for (int64_t task = begin; task < end; ++task) {
    double* sums = p.sums + task * 5 * C;
    for (int64_t c = 0; c < 5 * C; ++c) sums[c] = 0.0;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t c = 0; c < 5 * C; ++c) sums[c] += p.partial[(task * parts + part) * 5 * C + c];
    for (int64_t c = 0; c < C; ++c) {
      const double rstd = double(p.rstd[task * C + c]);
      sums[c] /= values;
      sums[C + c] *= rstd / values;
      sums[2 * C + c] /= values;
      sums[3 * C + c] *= rstd / values;
      sums[4 * C + c] = sums[4 * C + c] / values - sums[c] * sums[2 * C + c] - sums[C + c] * sums[3 * C + c];
      p.d_gamma[task * C + c] = T(rstd * values * sums[4 * C + c]);
    }
  }
}

// u = (v_gamma - gamma rstd mean(v xhat)) g - gamma rstd mean(g xhat) v; d_z = rstd P(u) - gamma rstd^2 mean(P(v) g) xhat;
// d_gy = gamma rstd P(v) + v_gamma xhat + v_beta at the maxima. Here with xhat = rstd (z - mean).
template <typename T>
static void dense_grad_grad(const NormReluPoolGradGrad<T>& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels, W = p.width, h = p.height / p.pool, w = W / p.pool;
  const int64_t bands = (p.height + p.pool - 1) / p.pool;
  for (int64_t c0 = 0; c0 < C; c0 += kStrip) {
    const int64_t n = C - c0 < kStrip ? C - c0 : kStrip;
    T of_v[kStrip], of_g[kStrip], of_z[kStrip], level[kStrip], gy_v[kStrip], gy_z[kStrip], gy_level[kStrip];
    const T* mean = p.mean;
    int64_t ready = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / bands, band = item % bands, task = image / p.images;
      if (task != ready) {
        mean = p.mean + task * C + c0;
        for (int64_t c = 0; c < n; ++c) {
          const double* sums = p.sums + task * 5 * C + c0 + c;
          const double v = sums[0], vx = sums[C], g = sums[2 * C], gx = sums[3 * C], pvg = sums[4 * C];
          const double r = double(p.rstd[task * C + c0 + c]), a = double(p.gamma[task * p.gamma_task + c0 + c]) * r;
          const double v_gamma = double(p.v_gamma[task * C + c0 + c]), v_beta = double(p.v_beta[task * C + c0 + c]);
          of_v[c] = T(-r * a * gx);
          of_g[c] = T(r * (v_gamma - a * vx));
          of_z[c] = T(-r * r * (v_gamma * gx - 2.0 * a * vx * gx + a * pvg));
          level[c] = T(-r * (v_gamma * g - a * (v * gx + g * vx)));
          gy_v[c] = T(a);
          gy_z[c] = T(r * (v_gamma - a * vx));
          gy_level[c] = T(v_beta - a * v);
        }
        ready = task;
      }
      const int64_t row = band * p.pool, rows = p.height - row < p.pool ? p.height - row : p.pool;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < W; ++j) {
          const int64_t at = ((image * p.height + row + r) * W + j) * C + c0, window = j / p.pool;
          const T *z = p.z + at, *v = p.v != nullptr ? p.v + at : z;
          const T zero = p.v != nullptr ? T(1) : T(0);
          const bool pooled = band < h && window < w;
          const int64_t out = pooled ? ((image * h + band) * w + window) * C + c0 : 0;
          const uint8_t here = uint8_t(r * p.pool + j % p.pool);
          if (p.d_z != nullptr) {
            T* d_z = p.d_z + at;
#pragma GCC ivdep
            for (int64_t c = 0; c < n; ++c) d_z[c] = of_v[c] * zero * v[c] + of_z[c] * (z[c] - mean[c]) + level[c];
          }
          if (!pooled) continue;
          const T* gy = p.gy + out;
          const uint8_t* index = p.index + out;
          T* d_gy = p.d_gy + out;
          if (p.d_z != nullptr) {
            T* d_z = p.d_z + at;
#pragma GCC ivdep
            for (int64_t c = 0; c < n; ++c) d_z[c] += index[c] == here ? of_g[c] * gy[c] : T(0);
          }
          const T start = here == 0 ? T(0) : T(1);
#pragma GCC ivdep
          for (int64_t c = 0; c < n; ++c) {
            const T before = start == T(0) ? T(0) : d_gy[c];
            const T own = gy_v[c] * zero * v[c] + gy_z[c] * (z[c] - mean[c]) + gy_level[c];
            d_gy[c] = index[c] == here ? own : before;
          }
        }
    }
  }
}

template <typename T>
static constexpr NormReluPoolKernels<T> table{moments<T>,         merge_moments<T>,  apply<T>, settle<T>,
                                              reduce<T>,          merge_reduce<T>,   dense<T>, reduce_grad_grad<T>,
                                              merge_grad_grad<T>, dense_grad_grad<T>};

extern const NormReluPoolKernels<float> norm_relu_pool_f32;
extern const NormReluPoolKernels<double> norm_relu_pool_f64;
const NormReluPoolKernels<float> norm_relu_pool_f32 = table<float>;
const NormReluPoolKernels<double> norm_relu_pool_f64 = table<double>;

}  // namespace LK_ISA
}  // namespace lk
