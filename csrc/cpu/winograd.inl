// The kernel bodies, compiled once per instruction set as those of norm_relu_pool.inl.

namespace lk {
namespace LK_ISA {

// B^T d B, in place
template <typename V>
static inline void to_points(V (&d)[4][4]) {
  for (int j = 0; j < 4; ++j) {
    const V a = d[0][j] - d[2][j], b = d[1][j] + d[2][j], c = d[2][j] - d[1][j], e = d[1][j] - d[3][j];
    d[0][j] = a, d[1][j] = b, d[2][j] = c, d[3][j] = e;
  }
  for (int i = 0; i < 4; ++i) {
    const V a = d[i][0] - d[i][2], b = d[i][1] + d[i][2], c = d[i][2] - d[i][1], e = d[i][1] - d[i][3];
    d[i][0] = a, d[i][1] = b, d[i][2] = c, d[i][3] = e;
  }
}

// Where a tile lies.
struct Tile {
  int64_t image, row, column;  // of y, its first pixel
};

template <typename T>
static inline Tile tile_of(const Winograd<T>& p, int64_t number) {
  const int64_t column = number % p.tile_columns, row = number / p.tile_columns;
  return {row / p.tile_rows, row % p.tile_rows * 2, column * 2};
}

template <typename T>
static inline void advance(const Winograd<T>& p, Tile& tile) {
  tile.column += 2;
  if (tile.column < 2 * p.tile_columns) return;
  tile.column = 0, tile.row += 2;
  if (tile.row == 2 * p.tile_rows) tile.row = 0, ++tile.image;
}

// One tile's channels c to c + L, of which `count` are there, transformed. `here` tells for each of its rows and columns
// whether it lies in the image; a tile that is kInside needs no telling.
template <typename T, bool kInside>
static inline void transform_tile(const T* at, int64_t down, int64_t right, const bool (*here)[4], int64_t count, T* v,
                                  int64_t step) {
  Values<T> d[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j)
      d[i][j] = kInside || (here[0][i] && here[1][j]) ? load(at + i * down + j * right, count) : Values<T>{};
  to_points(d);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) store(v + (i * 4 + j) * step, d[i][j]);
}

// The tiles from `first` on of x, transformed: v [16, count, padded inputs]
template <typename T>
static void transform_images(const Winograd<T>& p, const T* x, int64_t first, int64_t count, T* v) {
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t C = p.inputs, whole = C / L * L, step = p.group * p.padded_inputs + kWinogradGap, down = p.width * C;
  Tile tile = tile_of(p, first);
  for (int64_t n = 0; n < count; ++n, v += p.padded_inputs, advance(p, tile)) {
    const int64_t top = tile.row - p.pad_y, left = tile.column - p.pad_x;
    const T* corner = x + ((tile.image * p.height + top) * p.width + left) * C;
    bool here[2][4], inside = true;
    for (int i = 0; i < 4; ++i) {
      here[0][i] = top + i >= 0 && top + i < p.height;
      here[1][i] = left + i >= 0 && left + i < p.width;
      inside = inside && here[0][i] && here[1][i];
    }
    if (inside)
      for (int64_t c = 0; c < whole; c += L) transform_tile<T, true>(corner + c, down, C, here, L, v + c, step);
    for (int64_t c = inside ? whole : 0; c < C; c += L)
      transform_tile<T, false>(corner + c, down, C, here, C - c, v + c, step);
  }
}

// A^T m A of the products at `at`, one vector of outputs of one tile.
template <typename T>
static inline void from_points(const T* at, int64_t step, Values<T> (&y)[2][2]) {
  using V = Values<T>;
  V half[2][4];
  for (int j = 0; j < 4; ++j) {
    const V m0 = load(at + j * step), m1 = load(at + (4 + j) * step), m2 = load(at + (8 + j) * step),
            m3 = load(at + (12 + j) * step);
    half[0][j] = m0 + m1 + m2;
    half[1][j] = m1 - m2 - m3;
  }
  for (int i = 0; i < 2; ++i) {
    y[i][0] = half[i][0] + half[i][1] + half[i][2];
    y[i][1] = half[i][1] - half[i][2] - half[i][3];
  }
}

template <typename T>
static void place_products(const Winograd<T>& p, int64_t first, int64_t count, const T* products, int64_t step, T* to) {
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t O = p.outputs;
  Tile tile = tile_of(p, first);
  for (int64_t n = 0; n < count; ++n, advance(p, tile)) {
    T* const corner = to + ((tile.image * p.rows + tile.row) * p.columns + tile.column) * O;
    const bool below = tile.row + 1 < p.rows, right = tile.column + 1 < p.columns;
    for (int64_t o = 0; o < O; o += L) {
      Values<T> y[2][2];
      from_points(products + n * p.padded_outputs + o, step, y);
      unrolled<4>([&](auto k) {
        constexpr int i = k / 2, j = k % 2;
        if ((i == 0 || below) && (j == 0 || right)) store(corner + (i * p.columns + j) * O + o, y[i][j], O - o);
      });
    }
  }
}

// A tile is a window: its maximum, and the group's mean and squares, from sums around its first pixel. A NaN may be lost
// to the maximum: it is in the sums, which all of its channel's results are made with.
template <typename T>
static void pool_products(const Winograd<T>& p, int64_t first, int64_t count, const T* products, int64_t step,
                          double* partial) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes, kMost = 512;  // outputs at a time, bounds the stack
  const int64_t rows = p.rows / 2, columns = p.columns / 2;
  for (int64_t from = 0; from < p.outputs; from += kMost) {
    const int64_t end = p.outputs - from < kMost ? p.outputs : from + kMost;
    T level[kMost], sum[kMost], square[kMost];
    int64_t pixels = 0;
    Tile tile = tile_of(p, first);
    for (int64_t n = 0; n < count; ++n, advance(p, tile)) {
      const bool below = tile.row + 1 < p.rows, right = tile.column + 1 < p.columns;
      T* const to = p.pooled + ((tile.image * rows + tile.row / 2) * columns + tile.column / 2) * p.outputs;
      pixels += (below ? 2 : 1) * (right ? 2 : 1);
      for (int64_t o = from; o < end; o += L) {
        V y[2][2];
        from_points(products + n * p.padded_outputs + o, step, y);
        if (n == 0) store(level + o - from, y[0][0]);
        const V base = n == 0 ? y[0][0] : load(level + o - from);
        V d = y[0][0] - base, total = n == 0 ? d : load(sum + o - from) + d;
        V squares = n == 0 ? d * d : load(square + o - from) + d * d;
        V best = y[0][0];
        unrolled<3>([&](auto k) {
          constexpr int i = (k + 1) / 2, j = (k + 1) % 2;
          if ((i == 1 && !below) || (j == 1 && !right)) return;
          d = y[i][j] - base;
          total += d;
          squares += d * d;
          best = y[i][j] > best ? y[i][j] : best;
        });
        store(sum + o - from, total);
        store(square + o - from, squares);
        if (below && right) store(to + o, best, p.outputs - o);
      }
    }
    for (int64_t o = from; o < end; ++o) {
      const double mean = double(sum[o - from]) / double(pixels);
      partial[o] = double(level[o - from]) + mean;
      partial[p.padded_outputs + o] = double(square[o - from]) - mean * double(sum[o - from]);
      partial[2 * p.padded_outputs + o] = double(pixels);
    }
  }
}

// A tile is a window: its maximum, which a NaN of its pixels is, plus bias, and none below 0.
template <typename T>
static void pool_affine(const Winograd<T>& p, int64_t first, int64_t count, const T* products, int64_t step) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t rows = p.rows / 2, columns = p.columns / 2;
  Tile tile = tile_of(p, first);
  for (int64_t n = 0; n < count; ++n, advance(p, tile)) {
    if (tile.row + 1 >= p.rows || tile.column + 1 >= p.columns) continue;
    T* const to = p.pooled + ((tile.image * rows + tile.row / 2) * columns + tile.column / 2) * p.outputs;
    for (int64_t o = 0; o < p.outputs; o += L) {
      V y[2][2];
      from_points(products + n * p.padded_outputs + o, step, y);
      V best = y[0][0];
      for (int k = 1; k < 4; ++k) best = (best >= y[k / 2][k % 2]) | (best != best) ? best : y[k / 2][k % 2];
      best += load(p.bias + o, p.outputs - o);
      store(to + o, best < T(0) ? V{} : best, p.outputs - o);
    }
  }
}

template <typename T>
static void winograd_forward(const Winograd<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t C = p.inputs;
  const int64_t from = p.group * p.padded_inputs + kWinogradGap, to = p.group * p.padded_outputs + kWinogradGap;
  const int64_t tiles = p.images * p.tile_rows * p.tile_columns;
  T* const products = scratch + kPoints * from;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * p.group, count = tiles - first < p.group ? tiles - first : p.group;
    transform_images(p, p.x, first, count, scratch);
    for (int64_t k = 0; k < kPoints; ++k)
      product(Product<T>{scratch + k * from, p.padded_inputs, 1, p.u + k * C * p.padded_outputs, p.padded_outputs,
                         products + k * to, p.padded_outputs, count, p.padded_outputs, C, T(1), false});
    if (p.bias != nullptr)
      pool_affine(p, first, count, products, to);
    else if (p.pooled != nullptr)
      pool_products(p, first, count, products, to, p.partial + group * 3 * p.padded_outputs);
    else
      place_products(p, first, count, products, to, p.y);
  }
}

// The tiles from `first` on of gy, A gy A^T: to [16, count, padded outputs]
template <typename T>
static void transform_gradients(const Winograd<T>& p, const T* gy, int64_t first, int64_t count, T* to) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t O = p.outputs, step = p.group * p.padded_outputs + kWinogradGap;
  Tile tile = tile_of(p, first);
  for (int64_t n = 0; n < count; ++n, to += p.padded_outputs, advance(p, tile)) {
    const T* const corner = gy + ((tile.image * p.rows + tile.row) * p.columns + tile.column) * O;
    const bool below = tile.row + 1 < p.rows, right = tile.column + 1 < p.columns;
    for (int64_t o = 0; o < p.padded_outputs; o += L) {
      V half[4][2];
      for (int j = 0; j < 2; ++j) {
        const T* at = corner + j * O + o;
        const V up = o < O && (j == 0 || right) ? load(at, O - o) : V{};
        const V low = o < O && below && (j == 0 || right) ? load(at + p.columns * O, O - o) : V{};
        half[0][j] = up, half[1][j] = up + low, half[2][j] = up - low, half[3][j] = -low;
      }
      for (int i = 0; i < 4; ++i) {
        const V a = half[i][0], b = half[i][1];
        store(to + (i * 4 + 0) * step + o, a);
        store(to + (i * 4 + 1) * step + o, a + b);
        store(to + (i * 4 + 2) * step + o, a - b);
        store(to + (i * 4 + 3) * step + o, -b);
      }
    }
  }
}

template <typename T>
static void winograd_gradient(const Winograd<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t C = p.inputs;
  const int64_t from = p.group * p.padded_inputs + kWinogradGap, to = p.group * p.padded_outputs + kWinogradGap;
  const int64_t tiles = p.images * p.tile_rows * p.tile_columns, groups = (tiles + p.group - 1) / p.group;
  T* const gradients = scratch + kPoints * from;
  for (int64_t slab = begin; slab < end; ++slab) {
    T* const du = p.du + slab * kPoints * C * p.padded_outputs;
    bool add = p.more;
    for (int64_t group = groups * slab / p.slabs; group < groups * (slab + 1) / p.slabs; ++group, add = true) {
      const int64_t first = group * p.group, count = tiles - first < p.group ? tiles - first : p.group;
      transform_images(p, p.x, first, count, scratch);
      transform_gradients(p, p.gy, first, count, gradients);
      for (int64_t k = 0; k < kPoints; ++k)
        product(Product<T>{scratch + k * from, 1, p.padded_inputs, gradients + k * to, p.padded_outputs,
                           du + k * C * p.padded_outputs, p.padded_outputs, C, p.padded_outputs, count, T(1), add});
    }
  }
}

template <typename T>
static void winograd_forward_tangent(const WinogradTangent<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t C = p.inputs, size = C * p.padded_outputs;
  const int64_t from = p.group * p.padded_inputs + kWinogradGap, to = p.group * p.padded_outputs + kWinogradGap;
  const int64_t tiles = p.images * p.tile_rows * p.tile_columns;
  T *const v = scratch, *const v_dot = v + kPoints * from, *const m = v_dot + kPoints * from,
           *const m_dot = m + kPoints * to;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * p.group, count = tiles - first < p.group ? tiles - first : p.group;
    const auto multiply = [&](const T* a, const T* u, T* c, int64_t k, bool add) {
      product(Product<T>{a + k * from, p.padded_inputs, 1, u + k * size, p.padded_outputs, c + k * to, p.padded_outputs,
                         count, p.padded_outputs, C, T(1), add});
    };
    transform_images(p, p.x, first, count, v);
    if (p.x_dot != nullptr) transform_images(p, p.x_dot, first, count, v_dot);
    for (int64_t k = 0; k < kPoints; ++k) {
      multiply(v, p.u, m, k, false);
      if (p.x_dot != nullptr) multiply(v_dot, p.u, m_dot, k, false);
      if (p.u_dot != nullptr) multiply(v, p.u_dot, m_dot, k, p.x_dot != nullptr);
    }
    place_products(p, first, count, m, to, p.y);
    place_products(p, first, count, m_dot, to, p.y_dot);
  }
}

template <typename T>
static void winograd_gradient_tangent(const WinogradTangent<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t C = p.inputs, size = C * p.padded_outputs;
  const int64_t from = p.group * p.padded_inputs + kWinogradGap, to = p.group * p.padded_outputs + kWinogradGap;
  const int64_t tiles = p.images * p.tile_rows * p.tile_columns, groups = (tiles + p.group - 1) / p.group;
  T *const v = scratch, *const v_dot = v + kPoints * from, *const g = v_dot + kPoints * from,
           *const g_dot = g + kPoints * to;
  for (int64_t slab = begin; slab < end; ++slab) {
    bool more = false;
    for (int64_t group = groups * slab / p.slabs; group < groups * (slab + 1) / p.slabs; ++group, more = true) {
      const int64_t first = group * p.group, count = tiles - first < p.group ? tiles - first : p.group;
      const auto multiply = [&](const T* a, const T* b, T* c, int64_t k, bool add) {
        product(Product<T>{a + k * from, 1, p.padded_inputs, b + k * to, p.padded_outputs, c + (slab * kPoints + k) * size,
                           p.padded_outputs, C, p.padded_outputs, count, T(1), add});
      };
      const bool turns = p.x_dot != nullptr || p.du != nullptr;  // gy itself is multiplied
      transform_images(p, p.x, first, count, v);
      if (p.x_dot != nullptr) transform_images(p, p.x_dot, first, count, v_dot);
      transform_gradients(p, p.gy_dot, first, count, g_dot);
      if (turns) transform_gradients(p, p.gy, first, count, g);
      for (int64_t k = 0; k < kPoints; ++k) {
        multiply(v, g_dot, p.du_dot, k, more);
        if (p.x_dot != nullptr) multiply(v_dot, g, p.du_dot, k, true);
        if (p.du != nullptr) multiply(v, g, p.du, k, more);
      }
    }
  }
}

// u = G w G^T for each pair of channels.
template <typename T>
static void winograd_weights(const WinogradWeight<T>& p, int64_t begin, int64_t end) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t rows = p.turned ? p.outputs : p.inputs, columns = p.turned ? p.inputs : p.outputs;
  const int64_t down = p.strides[p.turned ? 0 : 1], along = p.strides[p.turned ? 1 : 0];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t first = 0; first < p.padded; first += L) {
      V g[3][3], half[4][3];
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
          const T* at = p.weight + row * down + first * along + (p.turned ? 2 - i : i) * p.strides[2] +
                        (p.turned ? 2 - j : j) * p.strides[3];
          if (along == 1) {
            g[i][j] = first < columns ? load(at, columns - first) : V{};
          } else {
            T lanes[L] = {};
            for (int64_t l = 0; l < L && first + l < columns; ++l) lanes[l] = at[l * along];
            g[i][j] = load(lanes);
          }
        }
      for (int j = 0; j < 3; ++j) {
        const V ends = (g[0][j] + g[2][j]) * T(0.5), middle = g[1][j] * T(0.5);
        half[0][j] = g[0][j], half[1][j] = ends + middle, half[2][j] = ends - middle, half[3][j] = g[2][j];
      }
      T* const to = p.u + row * p.padded + first;
      for (int i = 0; i < 4; ++i) {
        const V ends = (half[i][0] + half[i][2]) * T(0.5), middle = half[i][1] * T(0.5);
        const V points[4] = {half[i][0], ends + middle, ends - middle, half[i][2]};
        for (int j = 0; j < 4; ++j) store(to + (i * 4 + j) * rows * p.padded, points[j]);
      }
    }
}

// weight += scale G^T du G
template <typename T>
static void winograd_add_gradient(const WinogradWeight<T>& p, int64_t begin, int64_t end) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  const int64_t size = p.inputs * p.padded;
  for (int64_t c = begin; c < end; ++c)
    for (int64_t o = 0; o < p.outputs; o += L) {
      V half[3][4], sum[4][4];
      for (int64_t k = 0; k < kPoints; ++k) {
        const T* from = p.du + k * size + c * p.padded + o;
        V total = load(from);
        for (int64_t slab = 1; slab < p.slabs; ++slab) total += load(from + slab * kPoints * size);
        sum[k / 4][k % 4] = total;
      }
      for (int j = 0; j < 4; ++j) {
        const V middle = (sum[1][j] + sum[2][j]) * T(0.5);
        half[0][j] = sum[0][j] + middle, half[1][j] = (sum[1][j] - sum[2][j]) * T(0.5), half[2][j] = sum[3][j] + middle;
      }
      for (int i = 0; i < 3; ++i) {
        const V middle = (half[i][1] + half[i][2]) * T(0.5);
        const V row[3] = {half[i][0] + middle, (half[i][1] - half[i][2]) * T(0.5), half[i][3] + middle};
        for (int j = 0; j < 3; ++j) {
          T* const to = p.weight + o * p.strides[0] + c * p.strides[1] + i * p.strides[2] + j * p.strides[3];
          if (p.strides[0] == 1)
            store(to, load(to, p.outputs - o) + p.scale * row[j], p.outputs - o);
          else
            for (int64_t l = 0; l < L && o + l < p.outputs; ++l) to[l * p.strides[0]] += p.scale * row[j][l];
        }
      }
    }
}

extern const WinogradKernels<float> winograd_f32;
extern const WinogradKernels<double> winograd_f64;
const WinogradKernels<float> winograd_f32{winograd_weights<float>,         winograd_forward<float>,
                                          winograd_gradient<float>,        winograd_add_gradient<float>,
                                          winograd_forward_tangent<float>, winograd_gradient_tangent<float>};
const WinogradKernels<double> winograd_f64{winograd_weights<double>,         winograd_forward<double>,
                                           winograd_gradient<double>,        winograd_add_gradient<double>,
                                           winograd_forward_tangent<double>, winograd_gradient_tangent<double>};

}  // namespace LK_ISA
}  // namespace lk
