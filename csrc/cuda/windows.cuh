// What norm_relu_pool and its gradient share: how windows lie in z, and how channels and parts are split over blocks.
#pragma once
#include "common.cuh"

namespace lk {
namespace {

constexpr int kMergeChannels = 8, kMergeRows = kThreads / kMergeChannels;

// The first place of a window in its task's z, in elements.
template <int P>
__device__ inline int64_t first_place(const NormReluPool& p, const Place& at) {
  return ((at.image * p.height + int64_t(at.row) * P) * p.width + int64_t(at.column) * P) * p.channels;
}

// The offset of a window's place from its first one, in elements of z.
template <int P>
__device__ inline int64_t place_offset(int at, int64_t width, int64_t channels) {
  return (int64_t(at / P) * width + at % P) * channels;
}

// Parts of a task's windows for the elementwise passes: up to 8 turns of a block, fewer where there are few windows.
inline Cover elementwise(const NormReluPool& p, int pack, int64_t windows, int windows_a_turn) {
  Cover cover(p.channels, pack, 1);
  const int64_t turn = int64_t(cover.block().y) * windows_a_turn, turns = (windows + turn - 1) / turn;
  const int64_t each = turns * p.tasks * cover.chunks / 4096 + 1;
  cover.parts = (turns + (each < 8 ? each : 8) - 1) / (each < 8 ? each : 8);
  return cover;
}

inline bool fits(const NormReluPool& p) {
  return p.tasks >= 0 && p.images > 0 && p.channels > 0 && p.height > 0 && p.width > 0 && p.parts > 0 &&
         (p.pool == 1 || p.pool == 2) && p.height >= p.pool && p.width >= p.pool && p.height * p.width < kMostRelative &&
         p.images * p.height * p.width / p.parts < kMostRelative;
}

inline dim3 merge_block() { return dim3(kMergeChannels, kMergeRows); }
inline int64_t merge_blocks(const NormReluPool& p) { return p.tasks * ((p.channels + kMergeChannels - 1) / kMergeChannels); }

// call.template operator()<T, V, P>(): 16-byte packs of channels where count and addresses allow them, else single.
template <typename Call>
cudaError_t with_layout(const NormReluPool& p, int dtype, Call call) {
  return with_dtype(dtype, [&]<typename T>() {
    constexpr int kPack = sizeof(T) == 8 ? 1 : int(16 / sizeof(T));
    const bool packed = p.channels % kPack == 0 && p.z_task % kPack == 0 && aligned(p.z, 16) && aligned(p.y, 16) &&
                        aligned(p.gy, 16) && aligned(p.dz, 16) && aligned(p.index, kPack);
    if (packed) return p.pool == 2 ? call.template operator()<T, kPack, 2>() : call.template operator()<T, kPack, 1>();
    return p.pool == 2 ? call.template operator()<T, 1, 2>() : call.template operator()<T, 1, 1>();
  });
}

}  // namespace
}  // namespace lk
