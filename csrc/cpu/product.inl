// The kernel bodies, compiled once per instruction set as those of norm_relu_pool.inl.

namespace lk {
namespace LK_ISA {

// N vectors of M rows of c += scale a b, in registers over all of `depth`.
template <typename T, int M, int N>
static inline void product_tile(const Product<T>& p, const T* a, const T* b, T* c) {
  using V = Values<T>;
  constexpr int64_t L = Vector<T>::kLanes;
  V sum[M][N];
  unrolled<M * N>([&](auto i) { sum[i / N][i % N] = V{}; });
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_depth, b += p.b_row) {
    V row[N];
    unrolled<N>([&](auto v) { row[v] = load(b + v * L); });
    unrolled<M>([&](auto m) {
      const T value = a[m * p.a_row];
      unrolled<N>([&](auto v) { sum[m][v] += value * row[v]; });
    });
  }
  const T scale = p.scale;
  if (p.add)
    unrolled<M * N>([&](auto i) {
      T* const to = c + i / N * p.c_row + i % N * L;
      store(to, load(to) + scale * sum[i / N][i % N]);
    });
  else
    unrolled<M * N>([&](auto i) { store(c + i / N * p.c_row + i % N * L, scale * sum[i / N][i % N]); });
}

template <typename T, int M, int N>
static inline void product_columns(const Product<T>& p, int64_t column) {
  const T* b = p.b + column;
  T* c = p.c + column;
  int64_t m = 0;
  for (; m + M <= p.rows; m += M) product_tile<T, M, N>(p, p.a + m * p.a_row, b, c + m * p.c_row);
  if (M > 4)
    for (; m + 4 <= p.rows; m += 4) product_tile<T, 4, N>(p, p.a + m * p.a_row, b, c + m * p.c_row);
  for (; m < p.rows; ++m) product_tile<T, 1, N>(p, p.a + m * p.a_row, b, c + m * p.c_row);
}

template <typename T>
static void product(const Product<T>& p) {
  constexpr int64_t L = Vector<T>::kLanes;
  constexpr bool kMany = kVectorBytes == 64;  // 32 registers, else 16
  int64_t column = 0;
  if (kMany)
    for (; column + 4 * L <= p.columns; column += 4 * L) product_columns<T, 6, 4>(p, column);
  for (; column + 2 * L <= p.columns; column += 2 * L) product_columns<T, kMany ? 12 : 6, 2>(p, column);
  for (; column < p.columns; column += L) product_columns<T, kMany ? 16 : 12, 1>(p, column);
}

extern const ProductKernels<float> product_f32;
extern const ProductKernels<double> product_f64;
const ProductKernels<float> product_f32{product<float>};
const ProductKernels<double> product_f64{product<double>};

}  // namespace LK_ISA
}  // namespace lk
