// The kernel bodies, compiled once per instruction set as those of norm_relu_pool.inl.

namespace lk {
namespace LK_ISA {

// Sums of a window's, or of four neighbours', places that go together: enough that none waits for the one before it.
constexpr int kSums = kVectorBytes == 64 ? 16 : 8;

// a += the convolution at four places of each of G windows (P = 2) or fours of neighbours (P = 1), from the j-th on in the
// row at x, for N vectors of outputs from `first` on. Beyond the `last` neighbour it is that of the last one again.
template <typename T, int P, int N, int G>
static inline void convolve_places(const ImageBlock<T>& p, const T* x, int64_t j, int64_t last, int64_t first,
                                   Values<T> (&a)[4 * G][N]) {
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t right = p.stride_x * p.inputs, down = p.stride_y * p.width * p.inputs;
  int64_t offset[4 * G];
  unrolled<4 * G>([&](auto i) {
    if (P == 2)
      offset[i] = i / 2 % 2 * down + (i / 4 * 2 + i % 2) * right;
    else
      offset[i] = (j + i < last ? i : last - 1 - j) * right;
  });
  const T* corner = x + j * P * right;
  for (int64_t k = 0; k < p.taps; ++k) {
    const T* at = corner + p.offsets[k];
    const T* w = p.weight + k * p.padded_outputs + first;
    Values<T> row[N];
    unrolled<N>([&](auto v) { row[v] = load(w + v * L); });
    unrolled<4 * G>([&](auto i) {
      const T value = at[offset[i]];
      unrolled<N>([&](auto v) { a[i][v] += value * row[v]; });
    });
  }
}

// f(windows or fours of neighbours that go together, the first place of them) over a row of y.
template <int P, int N, typename F>
static inline void each_window(int64_t columns, const F& f) {
  constexpr int kTogether = kSums / (4 * N), kStep = P == 2 ? 1 : 4;
  int64_t j = 0;
  for (; kTogether > 1 && j + kTogether * kStep <= columns; j += kTogether * kStep) f(Number<kTogether>{}, j);
  for (; j < columns; j += kStep) f(Number<1>{}, j);
}

// f(vectors that go together, the first output of them) over a place's outputs.
template <typename T, typename F>
static inline void each_output(int64_t outputs, const F& f) {
  constexpr int64_t L = Vector<T>::kLanes;
  int64_t first = 0;
  if (kSums == 16)
    for (; first + 3 * L < outputs; first += 4 * L) f(Number<kSums / 4>{}, first);
  for (; first + L < outputs; first += 2 * L) f(Number<2>{}, first);
  for (; first < outputs; first += L) f(Number<1>{}, first);
}

// G windows' N vectors of outputs, in the row of y that begins at x and y.
template <typename T, int P, int N, int G>
static inline void apply_windows(const ImageBlock<T>& p, const T* x, T* y, uint8_t* index, int64_t first, int64_t j) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  V a[4 * G][N];
  unrolled<N>([&](auto v) {
    const V start = -load(p.mean + first + v * L);
    unrolled<4 * G>([&](auto i) { a[i][v] = start; });
  });
  convolve_places<T, P, N, G>(p, x, j, p.columns, first, a);
  unrolled<N>([&](auto v) {
    const V scale = load(p.scale + first + v * L), beta = load(p.beta + first + v * L);
    const int64_t count = p.outputs - first - v * L;  // that are no padding
    unrolled<(P == 2 ? G : 4 * G)>([&](auto i) {
      if (P == 1 && j + i >= p.columns) return;
      V best = a[i * P * P][v] * scale + beta;
      auto place = best != best;
      place ^= place;
      unrolled<P * P - 1>([&](auto n) {
        constexpr int other = n + 1;
        const V b = a[i * 4 + other][v] * scale + beta;
        const auto higher = (b > best) | (b != b);  // a NaN is a maximum, as in torch
        best = higher ? b : best;
        place = higher ? place * 0 + other : place;
      });
      const auto shut = best <= V{};
      place = shut ? place * 0 + P * P : place;
      best = best < V{} ? V{} : best;
      const Bytes<T> bytes = __builtin_convertvector(place, Bytes<T>);
      T* to = y + (j + i) * p.outputs + first + v * L;
      uint8_t* at = index + (j + i) * p.outputs + first + v * L;
      if (count >= L) {
        *reinterpret_cast<V*>(to) = best;
        *reinterpret_cast<Bytes<T>*>(at) = bytes;
      } else {
        for (int64_t c = 0; c < count; ++c) to[c] = best[c], at[c] = bytes[c];
      }
    });
  });
}

template <typename T, int P>
static void apply_images(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.rows, row = item % p.rows;
    const T* x = p.x + (image * p.height + row * P * p.stride_y) * p.width * p.inputs;
    T* y = p.y + item * p.columns * p.outputs;
    uint8_t* index = p.index + item * p.columns * p.outputs;
    each_output<T>(p.outputs, [&](auto vectors, int64_t first) {
      each_window<P, vectors.value>(p.columns, [&](auto windows, int64_t j) {
        apply_windows<T, P, vectors.value, windows.value>(p, x, y, index, first, j);
      });
    });
  }
}

template <typename T>
static void image_apply(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  if (p.pool == 2)
    apply_images<T, 2>(p, begin, end);
  else
    apply_images<T, 1>(p, begin, end);
}

// As apply_windows, at the places that the row's index tells.
template <typename T, int P, int N, int G>
static inline void follow_windows(const ImageBlock<T>& p, const T* x, T* y, const uint8_t* index, int64_t first, int64_t j) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  V a[4 * G][N];
  unrolled<N>([&](auto v) {
    const V start = load(p.beta + first + v * L) - load(p.mean + first + v * L);
    unrolled<4 * G>([&](auto i) { a[i][v] = start; });
  });
  convolve_places<T, P, N, G>(p, x, j, p.columns, first, a);
  unrolled<N>([&](auto v) {
    const int64_t count = p.outputs - first - v * L;  // that are no padding
    unrolled<(P == 2 ? G : 4 * G)>([&](auto i) {
      if (P == 1 && j + i >= p.columns) return;
      const auto place = load_bytes<T>(index + (j + i) * p.outputs + first + v * L, count);
      V value = place == 0 ? a[i * P * P][v] : V{};
      unrolled<P * P - 1>([&](auto n) {
        constexpr int other = n + 1;
        value = place == other ? a[i * 4 + other][v] : value;
      });
      store(y + (j + i) * p.outputs + first + v * L, value, count);
    });
  });
}

template <typename T, int P>
static void follow_images(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.rows, row = item % p.rows;
    const T* x = p.x + (image * p.height + row * P * p.stride_y) * p.width * p.inputs;
    T* y = p.y + item * p.columns * p.outputs;
    const uint8_t* index = p.index + item * p.columns * p.outputs;
    each_output<T>(p.outputs, [&](auto vectors, int64_t first) {
      each_window<P, vectors.value>(p.columns, [&](auto windows, int64_t j) {
        follow_windows<T, P, vectors.value, windows.value>(p, x, y, index, first, j);
      });
    });
  }
}

template <typename T>
static void image_follow(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  if (p.pool == 2)
    follow_images<T, 2>(p, begin, end);
  else
    follow_images<T, 1>(p, begin, end);
}

// One place's convolution for N vectors of outputs.
template <typename T, int N>
static inline void convolve(const ImageBlock<T>& p, const T* corner, int64_t first, Values<T> (&z)[N]) {
  constexpr int64_t L = Vector<T>::kLanes;
  for (int v = 0; v < N; ++v) z[v] = Values<T>{};
  for (int64_t k = 0; k < p.taps; ++k) {
    const T value = corner[p.offsets[k]];
    for (int v = 0; v < N; ++v) z[v] += value * load(p.weight + k * p.padded_outputs + first + v * L);
  }
}

// Of the P (at the lower edge fewer) rows of the convolution's output z from x on: sums of z and of z^2, and the maximum of
// each whole window (P = 2) or z itself (P = 1). A NaN may be lost to the maximum, not to the sums.
template <typename T, int P, int N>
static inline void survey_rows(const ImageBlock<T>& p, const T* x, int64_t out_rows, T* y, int64_t first, double* sums) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  V sum[N] = {}, square[N] = {};
  const int64_t right = p.stride_x * p.inputs, down = p.stride_y * p.width * p.inputs;
  const int64_t columns = out_rows == P ? p.columns : 0;
  each_window<P, N>(columns, [&](auto windows, int64_t j) {
    constexpr int G = windows.value;
    V z[4 * G][N];
    unrolled<4 * G * N>([&](auto i) { z[i / N][i % N] = V{}; });
    convolve_places<T, P, N, G>(p, x, j, columns, first, z);
    unrolled<N>([&](auto v) {
      unrolled<(P == 2 ? G : 4 * G)>([&](auto i) {
        if (P == 1 && j + i >= columns) return;
        V best = z[i * P * P][v];
        unrolled<P * P>([&](auto place) {
          const V value = z[i * P * P + place][v];
          sum[v] += value;
          square[v] += value * value;
          best = value > best ? value : best;
        });
        store(y + (j + i) * p.outputs + first + v * L, best, p.outputs - first - v * L);
      });
    });
  });
  // Places that no whole window covers.
  for (int64_t i = 0; i < out_rows; ++i)
    for (int64_t j = columns * P; j < p.out_columns; ++j) {
      V z[N];
      convolve<T, N>(p, x + i * down + j * right, first, z);
      for (int v = 0; v < N; ++v) sum[v] += z[v], square[v] += z[v] * z[v];
    }
  for (int v = 0; v < N; ++v)
    for (int64_t l = 0; l < L; ++l) {
      sums[first + v * L + l] += double(sum[v][l]);
      sums[p.padded_outputs + first + v * L + l] += double(square[v][l]);
    }
}

template <typename T, int P>
static void survey_images(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  const int64_t bands = (p.out_rows + P - 1) / P, items = p.images * bands;
  for (int64_t slab = begin; slab < end; ++slab) {
    double* sums = p.partial + slab * 2 * p.padded_outputs;
    for (int64_t i = 0; i < 2 * p.padded_outputs; ++i) sums[i] = 0.0;
    for (int64_t item = items * slab / p.slabs; item < items * (slab + 1) / p.slabs; ++item) {
      const int64_t image = item / bands, band = item % bands;
      const int64_t rows = p.out_rows - band * P < P ? p.out_rows - band * P : P;
      const T* x = p.x + (image * p.height + band * P * p.stride_y) * p.width * p.inputs;
      T* y = p.y + (image * p.rows + band) * p.columns * p.outputs;
      each_output<T>(p.outputs,
                     [&](auto vectors, int64_t first) { survey_rows<T, P, vectors.value>(p, x, rows, y, first, sums); });
    }
  }
}

template <typename T>
static void image_survey(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  if (p.pool == 2)
    survey_images<T, 2>(p, begin, end);
  else
    survey_images<T, 1>(p, begin, end);
}

// Adds sums over a row, of the taps from `tap` on and of g (with the first ones alone), to those in double.
template <typename T>
static inline void add_row(const ImageBlock<T>& p, const Values<T> (&a)[kImageTaps], Values<T> all, int64_t tap,
                           int64_t first, double* sums) {
  constexpr int64_t L = Vector<T>::kLanes;
  double *const own = sums + tap * p.padded_outputs + first, *const total = sums + p.padded_taps * p.padded_outputs + first;
  for (int k = 0; k < kImageTaps; ++k)
    for (int64_t c = 0; c < L; ++c) own[k * p.padded_outputs + c] += double(a[k][c]);
  if (tap == 0)
    for (int64_t c = 0; c < L; ++c) total[c] += double(all[c]);
}

// A row's sums of g patch for kImageTaps taps from `tap` on, and of g, for a vector of outputs.
template <typename T, int P>
static inline void reduce_row(const ImageBlock<T>& p, const T* x, const T* gy, const uint8_t* index, int64_t tap,
                              int64_t first, double* sums) {
  using V = Values<T>;
  constexpr int kPlaces = P * P;
  V a[kImageTaps], all = {};
  unrolled<kImageTaps>([&](auto k) { a[k] = V{}; });
  const int64_t right = p.stride_x * p.inputs, down = p.stride_y * p.width * p.inputs;
  const int64_t count = p.outputs - first;
  for (int64_t j = 0; j < p.columns; ++j) {
    const T* corner = x + j * P * right;
    const V value = load(gy + j * p.outputs + first, count);
    const auto place = load_bytes<T>(index + j * p.outputs + first, count);
    V g[kPlaces];
    unrolled<kPlaces>([&](auto i) {
      g[i] = place == i.value ? value : V{};
      all += g[i];
    });
    unrolled<kImageTaps>([&](auto k) {
      const T* at = corner + p.offsets[tap + k];
      unrolled<kPlaces>([&](auto i) { a[k] += at[i / P * down + i % P * right] * g[i]; });
    });
  }
  add_row(p, a, all, tap, first, sums);
}

// The same for a dense convolution of 3x3 pixels and windows of 2x2, whose rows of 4 pixels fit a vector: one product per
// tap, of the pixel at the maximum.
template <typename T>
static inline void reduce_picked(const ImageBlock<T>& p, const T* x, const T* gy, const uint8_t* index, int64_t tap,
                                 int64_t first, double* sums) {
  using V = Values<T>;
  constexpr int kRows = 4;
  V a[kImageTaps], all = {};
  unrolled<kImageTaps>([&](auto k) { a[k] = V{}; });
  const int64_t C = p.inputs, step = p.width * C, count = p.outputs - first;
  const auto below = int(Vector<T>::kLanes), right = int(C), channel = int(tap / kImageTaps);
  for (int64_t j = 0; j < p.columns; ++j) {
    V rows[kRows];
    unrolled<kRows>([&](auto i) { rows[i] = load(x + i * step + 2 * j * C); });
    const auto place = load_bytes<T>(index + j * p.outputs + first, count);
    const V g = place < 4 ? load(gy + j * p.outputs + first, count) : V{};
    all += g;
    auto lane = (-(place & 1) & right) + (-((place & 2) >> 1) & below) + channel;
    unrolled<3>([&](auto column) {
      unrolled<3>([&](auto row) { a[row * 3 + column] += pick<T>(rows[row], rows[row + 1], lane) * g; });
      lane += right;
    });
  }
  add_row(p, a, all, tap, first, sums);
}

template <typename T, int P>
static void reduce_images(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t L = Vector<T>::kLanes;
  const bool picked = kPicks && P == 2 && p.dense && p.kernel_y == 3 && p.kernel_x == 3 && 4 * p.inputs <= L;
  const int64_t items = p.images * p.rows;
  for (int64_t slab = begin; slab < end; ++slab) {
    double* sums = p.partial + slab * (p.padded_taps + 1) * p.padded_outputs;
    for (int64_t i = 0; i < (p.padded_taps + 1) * p.padded_outputs; ++i) sums[i] = 0.0;
    for (int64_t item = items * slab / p.slabs; item < items * (slab + 1) / p.slabs; ++item) {
      const int64_t image = item / p.rows, row = item % p.rows;
      const T* x = p.x + (image * p.height + row * P * p.stride_y) * p.width * p.inputs;
      const T* gy = p.gy + item * p.columns * p.outputs;
      const uint8_t* index = p.index + item * p.columns * p.outputs;
      for (int64_t tap = 0; tap < p.padded_taps; tap += kImageTaps)
        for (int64_t first = 0; first < p.outputs; first += L) {
          if constexpr (kPicks) {
            if (picked) {
              reduce_picked(p, x, gy, index, tap, first, sums);
              continue;
            }
          }
          reduce_row<T, P>(p, x, gy, index, tap, first, sums);
        }
    }
  }
}

template <typename T>
static void image_reduce(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  if (p.pool == 2)
    reduce_images<T, 2>(p, begin, end);
  else
    reduce_images<T, 1>(p, begin, end);
}

// sums[s][t] += the products of a row's places t with places t + first + s of the row `distance` below, over rows [from, to),
// for S shifts and one vector of places.
template <int S>
static void shifted_products(const double* rows, int64_t step, int64_t from, int64_t to, int64_t distance, int64_t first,
                             int64_t t, double* sums) {
  Values<double> sum[S];
  unrolled<S>([&](auto s) { sum[s] = load(sums + s * step + t); });
  for (int64_t a = from; a < to; ++a) {
    const Values<double> value = load(rows + a * step + t);
    const double* other = rows + (a + distance) * step + t + first;
    unrolled<S>([&](auto s) { sum[s] += value * load(other + s); });
  }
  unrolled<S>([&](auto s) { store(sums + s * step + t, sum[s]); });
}

// The most shifts that go together: all those of a 3x3 convolution of three channels where there are registers for them.
constexpr int kShifts = kVectorBytes == 64 ? 17 : 9;

template <int S = kShifts>
static inline void shifted_products(int64_t shifts, const double* rows, int64_t step, int64_t from, int64_t to,
                                    int64_t distance, int64_t first, int64_t t, double* sums) {
  if constexpr (S > 0) {
    if (shifts == S) return shifted_products<S>(rows, step, from, to, distance, first, t, sums);
    shifted_products<S - 1>(shifts, rows, step, from, to, distance, first, t, sums);
  }
}

// The moments of the patches of a dense convolution: two taps whose distance is that of two others have the same products
// but at the borders, so each product of values is taken once. Sums by place in the row, over the rows that all taps share
// and over each of the others apart, give every tap's own.
template <typename T>
static void dense_moments(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t L = Vector<double>::kLanes;
  const int64_t kh = p.kernel_y, kw = p.kernel_x, C = p.inputs, K = p.taps, side = K + 1;
  const int64_t length = p.width * C, shifts = image_shifts(p), most = kw * C - 1, step = image_row(p);
  const int64_t groups = 2 * kh - 1;  // of rows: shared ones, those above, those below
  for (int64_t slab = begin; slab < end; ++slab) {
    double* const memory = p.scratch + slab * image_moments_scratch(p);
    double* const rows = memory + most;  // zeros around each row
    double* const sums = memory + step * p.height;
    for (int64_t i = 0; i < image_moments_scratch(p); ++i) memory[i] = 0.0;
    const auto place = [&](int64_t distance, int64_t group) { return sums + (distance * groups + group) * shifts * step; };
    for (int64_t image = p.images * slab / p.slabs; image < p.images * (slab + 1) / p.slabs; ++image) {
      for (int64_t a = 0; a < p.height; ++a) {
        const T* from = p.x + (image * p.height + a) * length;
        for (int64_t t = 0; t < length; ++t) rows[a * step + t] = double(from[t]);
      }
      for (int64_t distance = 0; distance < kh; ++distance) {
        const int64_t apart = kh - 1 - distance, first = distance == 0 ? 0 : -most;
        const int64_t count = distance == 0 ? most + 1 : shifts, parts = (count + kShifts - 1) / kShifts;
        for (int64_t group = 0; group <= 2 * apart; ++group) {
          const int64_t from = group == 0 ? apart : group <= apart ? group - 1 : p.out_rows + group - apart - 1;
          const int64_t to = group == 0 ? p.out_rows : from + 1;
          double* const own = place(distance, group);
          for (int64_t t = 0; t < length; t += L)
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t s = count * part / parts;
              shifted_products(count * (part + 1) / parts - s, rows, step, from, to, distance, first + s, t, own + s * step);
            }
        }
      }
      for (int64_t group = 0; group < groups; ++group) {  // the values themselves
        const int64_t apart = kh - 1, from = group == 0       ? apart
                                             : group <= apart ? group - 1
                                                              : p.out_rows + group - apart - 1;
        const int64_t to = group == 0 ? p.out_rows : from + 1;
        double* const own = place(kh, group);
        for (int64_t a = from; a < to; ++a)
          for (int64_t t = 0; t < length; ++t) own[t] += rows[a * step + t];
      }
    }
    // Of the tap in row i, column j of channel c: rows i to i + out_rows, places (j + w) C + c.
    double* const to = p.partial + slab * side * side;
    const auto whole = [&](int64_t distance, int64_t s, int64_t i, int64_t j, int64_t c) {
      const int64_t apart = (distance == kh ? kh - 1 : kh - 1 - distance);
      double total = 0.0;
      for (int64_t group = 0; group <= 2 * apart; ++group) {
        // the rows above from i on, the rows below up to i
        if (group > 0 && (group <= apart ? group - 1 < i : group - apart - 1 >= i)) continue;
        const double* own = place(distance, group) + s * step + j * C + c;
        for (int64_t w = 0; w < p.out_columns; ++w) total += own[w * C];
      }
      return total;
    };
    for (int64_t k = 0; k < K; ++k) {
      const int64_t c = k / (kh * kw), i = k / kw % kh, j = k % kw;
      to[k * side + K] = to[K * side + k] = whole(kh, 0, i, j, c);
      for (int64_t l = 0; l < K; ++l) {
        const int64_t e = l / (kh * kw), m = l / kw % kh, n = l % kw, shift = (n - j) * C + e - c;
        if (m < i || (m == i && shift < 0)) continue;  // the other way round
        to[k * side + l] = to[l * side + k] = whole(m - i, m == i ? shift : shift + most, i, j, c);
      }
    }
    const int64_t images = p.images * (slab + 1) / p.slabs - p.images * slab / p.slabs;
    to[K * side + K] = double(images * p.out_rows * p.out_columns);
  }
}

// Patches of kPixels places, as doubles with a 1 behind them and zeros up to kSide.
constexpr int64_t kSide = 40, kPixels = 32;

template <typename T>
static void image_moments(const ImageBlock<T>& p, int64_t begin, int64_t end) {
  using V = Values<double>;
  constexpr int64_t L = Vector<double>::kLanes;
  constexpr int kRows = kVectorBytes == 64 ? 8 : 4, kColumns = kVectorBytes == 64 ? 3 : 2;
  if (by_distance(p)) return dense_moments(p, begin, end);
  const int64_t K = p.taps, side = K + 1, items = p.images * p.out_rows;
  double patch[kPixels][kSide], second[kSide][kSide];
  for (int64_t slab = begin; slab < end; ++slab) {
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j) second[i][j] = 0.0;
    for (int64_t item = items * slab / p.slabs; item < items * (slab + 1) / p.slabs; ++item) {
      const int64_t image = item / p.out_rows, row = item % p.out_rows;
      const T* x = p.x + (image * p.height + row * p.stride_y) * p.width * p.inputs;
      for (int64_t from = 0; from < p.out_columns; from += kPixels) {
        const int64_t count = p.out_columns - from < kPixels ? p.out_columns - from : kPixels;
        for (int64_t n = 0; n < count; ++n) {
          const T* corner = x + (from + n) * p.stride_x * p.inputs;
          for (int64_t k = 0; k < K; ++k) patch[n][k] = double(corner[p.offsets[k]]);
          patch[n][K] = 1.0;
          for (int64_t k = side; k < kSide; ++k) patch[n][k] = 0.0;
        }
        // The upper triangle, in tiles of kRows x kColumns vectors.
        for (int64_t i = 0; i < side; i += kRows)
          for (int64_t j = i / L * L; j < side; j += kColumns * L) {
            V sum[kRows][kColumns] = {};
            const int64_t most = (kSide - j) / L;  // whole vectors that are left
            for (int64_t n = 0; n < count; ++n)
              for (int r = 0; r < kRows; ++r)
                for (int c = 0; c < kColumns; ++c)
                  if (c < most) sum[r][c] += patch[n][i + r] * load(&patch[n][j + c * L]);
            for (int r = 0; r < kRows; ++r)
              for (int c = 0; c < kColumns; ++c)
                if (c < most)
                  for (int64_t l = 0; l < L; ++l) second[i + r][j + c * L + l] += sum[r][c][l];
          }
      }
    }
    double* to = p.partial + slab * side * side;
    for (int64_t i = 0; i < side; ++i)
      for (int64_t j = i; j < side; ++j) to[i * side + j] = to[j * side + i] = second[i][j];
  }
}

extern const ImageBlockKernels<float> image_block_f32;
extern const ImageBlockKernels<double> image_block_f64;
const ImageBlockKernels<float> image_block_f32{image_moments<float>, image_apply<float>, image_reduce<float>,
                                               image_survey<float>, image_follow<float>};
const ImageBlockKernels<double> image_block_f64{image_moments<double>, image_apply<double>, image_reduce<double>,
                                                image_survey<double>, image_follow<double>};

}  // namespace LK_ISA
}  // namespace lk
