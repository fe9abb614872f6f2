// Vectors of the instruction set; included before all other kernel bodies.

namespace lk {
namespace LK_ISA {

constexpr int64_t kVectorBytes = LK_VECTOR_BYTES;

template <typename T>
struct Vector {
  static constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(T));
  typedef T Values __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / sizeof(T)), aligned(1)));  // one per lane
  typedef uint16_t Shorts __attribute__((vector_size(2 * kVectorBytes / sizeof(T))));
  typedef uint32_t Words __attribute__((vector_size(4 * kVectorBytes / sizeof(T))));
};
template <typename T>
using Values = typename Vector<T>::Values;
template <typename T>
using Bytes = typename Vector<T>::Bytes;
template <typename T>
using Mask = decltype(Values<T>{} == Values<T>{});  // an integer per lane

// A number that a function's type depends on, and an index that is one.
template <int n>
struct Number {
  static constexpr int value = n;
  constexpr operator int() const { return n; }
};

// f(Number<0>) to f(Number<n - 1>), with no loop: what f holds in arrays of vectors stays in registers, where a loop that
// is unrolled late keeps it in memory.
template <int n, typename F>
[[gnu::always_inline]] static inline void unrolled(const F& f) {
  if constexpr (n > 0) {
    unrolled<n - 1>(f);
    f(Number<n - 1>{});
  }
}

template <typename T>
static inline Values<T> load(const T* from) {
  return *reinterpret_cast<const Values<T>*>(from);
}

template <typename T>
static inline void store(T* to, Values<T> v) {
  *reinterpret_cast<Values<T>*>(to) = v;
}

// The first `count` lanes, and zeros.
template <typename T>
static inline Values<T> load(const T* from, int64_t count) {
  if (count >= Vector<T>::kLanes) return load(from);
  Values<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <typename T>
static inline void store(T* to, Values<T> v, int64_t count) {
  if (count >= Vector<T>::kLanes) return store(to, v);
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

// The first `count` bytes as integers, and zeros. Compilers widen them at once by twice alone.
template <typename T>
static inline Mask<T> load_bytes(const uint8_t* from, int64_t count) {
  constexpr int64_t L = Vector<T>::kLanes;
  if (count >= L) {
    const auto twice = __builtin_convertvector(*reinterpret_cast<const Bytes<T>*>(from), typename Vector<T>::Shorts);
    return __builtin_convertvector(__builtin_convertvector(twice, typename Vector<T>::Words), Mask<T>);
  }
  Mask<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

// Each lane is one of low's, or, from kLanes on, of high's. kPicks: whether that is one instruction.
#if LK_VECTOR_BYTES == 64 && !defined(__clang__)
constexpr bool kPicks = true;
template <typename T>
static inline Values<T> pick(Values<T> low, Values<T> high, Mask<T> lane) {
  return __builtin_shuffle(low, high, lane);
}
#else
constexpr bool kPicks = false;
template <typename T>
Values<T> pick(Values<T> low, Values<T> high, Mask<T> lane);
#endif

}  // namespace LK_ISA
}  // namespace lk
