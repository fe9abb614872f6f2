// Vectors of the instruction set; included before all other kernel bodies.

namespace lk {
namespace LK_ISA {

constexpr int64_t kVectorBytes = LK_VECTOR_BYTES;

template <typename T>
struct Vector {
  static constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(T));
  typedef T Values __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / sizeof(T)), aligned(1)));  // one per lane
};
template <typename T>
using Values = typename Vector<T>::Values;
template <typename T>
using Bytes = typename Vector<T>::Bytes;

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

}  // namespace LK_ISA
}  // namespace lk
