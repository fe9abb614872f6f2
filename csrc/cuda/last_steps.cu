// How all steps of the last layers are spread over a device, and their launch (steps.cuh).
#include "steps.cuh"

namespace lk {
namespace {

template <typename T>
bool fits(LastSteps& p, int64_t shared) {
  p.shared_bytes = Near<T>(p, nullptr).bytes;
  p.scratch_bytes = Far<T>(p, nullptr).bytes;
  return p.shared_bytes <= shared;
}

// Keeps as much as there is room for: all of it; else y and z before more images than one.
template <typename T>
bool place(LastSteps& p, int64_t shared) {
  if (p.outputs == 0) {
    p.images_at_once = 0, p.keeps_z = 1, p.keeps_y = 1;
    if (fits<T>(p, shared)) return true;
    p.keeps_y = 0;
    return fits<T>(p, shared);
  }
  const int64_t images = (p.images + p.parts - 1) / p.parts;
  p.images_at_once = images, p.keeps_z = 1, p.keeps_y = 1;
  if (fits<T>(p, shared)) return true;
  p.keeps_z = 0;
  if (fits<T>(p, shared)) return true;
  for (p.keeps_y = 1; p.keeps_y >= 0; --p.keeps_y) {
    for (p.images_at_once = images; p.images_at_once > 0; --p.images_at_once)
      if (fits<T>(p, shared)) return true;
  }
  return false;
}

// Splits a task over the multiprocessors that there are for it.
template <typename T>
bool plan(LastSteps& p, int64_t processors, int64_t shared) {
  const int64_t each = processors / p.tasks > 0 ? processors / p.tasks : 1;
  for (int64_t channels = each >= (p.outputs + 7) / 8 || p.outputs <= 8 ? 8 : 32; channels >= 8; channels -= 24) {
    p.channels = p.outputs > 0 ? channels : 0;
    p.groups = p.outputs > 0 ? (p.outputs + channels - 1) / channels : (each < 8 ? each : 8);
    const int64_t most = each / p.groups, parts = most < 1 ? 1 : most < p.images ? most : p.images;
    const int64_t images = (p.images + parts - 1) / parts;
    p.parts = p.outputs > 0 ? (p.images + images - 1) / images : 1;
    if (p.groups * p.parts > processors || !place<T>(p, shared)) continue;
    const int64_t most_tasks = processors / (p.groups * p.parts), launches = (p.tasks + most_tasks - 1) / most_tasks;
    p.tasks_at_once = (p.tasks + launches - 1) / launches;
    return true;
  }
  return false;
}

inline bool sound(const LastSteps& p) {
  const bool head = p.tasks > 0 && p.images > 0 && p.ways > 0 && p.features > 0 && p.steps > 0 && p.steps <= kMostSteps;
  if (!head || p.images * p.features * p.tasks > kMostRelative * 64 || p.images * p.ways > kMostRelative) return false;
  if (p.outputs == 0) return true;
  return p.outputs > 0 && p.inputs > 0 && p.kernel_height > 0 && p.kernel_width > 0 && (p.pool == 1 || p.pool == 2) &&
         p.out_height >= p.pool && p.out_width >= p.pool &&
         p.outputs * (p.out_height / p.pool) * (p.out_width / p.pool) == p.features &&
         p.images * p.height * p.width * (p.inputs + 12) < kMostRelative &&
         p.images * p.out_height * p.out_width * (p.outputs + 32) < kMostRelative;
}

}  // namespace
}  // namespace lk

// Fills in how the steps are spread over so many multiprocessors of so many bytes of shared memory; 0 where they fit.
LK_EXPORT int lk_last_steps_plan(lk::LastSteps* p, int dtype, int64_t processors, int64_t shared) {
  if (!lk::sound(*p)) return cudaErrorInvalidValue;
  return lk::with_dtype(dtype, [&]<typename S>() {
    return lk::plan<lk::Wide<S>>(*p, processors, shared) ? cudaSuccess : cudaErrorInvalidConfiguration;
  });
}

// After lk_last_steps_plan. Reads x, labels, from, rates, eps; writes to, rows; scratch: scratch, counters.
LK_EXPORT int lk_last_steps(const lk::LastSteps* p, int dtype, void* stream) {
  if (!lk::sound(*p) || p->groups <= 0 || p->parts <= 0 || p->tasks_at_once <= 0) return cudaErrorInvalidConfiguration;
  LK_RETURN_IF_FAILED(
      cudaMemsetAsync(p->counters, 0, std::size_t(p->tasks) * sizeof(uint32_t), static_cast<cudaStream_t>(stream)));
  if (dtype == lk::kFloat64) return lk::steps<double, 1>(*p, stream);
  if (dtype != lk::kFloat32) return lk::steps_of_half(*p, dtype, stream);
  return p->tf32 ? lk::steps<float, 1>(*p, stream) : lk::steps<float, 3>(*p, stream);
}
