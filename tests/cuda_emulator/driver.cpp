// Calls every launcher of the emulated library on heap buffers of exactly the sizes that csrc/cuda/parameters.h
// promises, under the address and undefined-behaviour sanitizers. Prints "ok".
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/parameters.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

extern "C" {
int lk_norm_relu_pool(const lk::NormReluPool*, int, void*);
int lk_norm_relu_pool_grad(const lk::NormReluPool*, int, void*);
int lk_image_moments(const lk::ImageBlock*, int, void*);
int lk_image_block(const lk::ImageBlock*, int, void*);
int lk_image_block_grad(const lk::ImageBlock*, int, void*);
int lk_cross_entropy_grad(const lk::CrossEntropy*, int, void*);
int lk_sgd(const lk::Sgd*, int, void*);
int lk_last_steps_plan(lk::LastSteps*, int, int64_t, int64_t);
int lk_last_steps(const lk::LastSteps*, int, void*);
}

namespace {

constexpr int kSizes[] = {4, 8, 2, 2}, kWideSizes[] = {4, 8, 4, 4};  // bytes, by lk::Dtype

std::vector<std::unique_ptr<char[]>> owned;
uint32_t seed = 1;

void* bytes(int64_t count, int64_t size) {
  owned.push_back(std::make_unique<char[]>(std::size_t(count * size)));
  return owned.back().get();
}

void* numbers(int64_t count, int dtype) {
  void* made = bytes(count, kSizes[dtype]);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float v = float(seed >> 8) / float(1 << 23) - 1.0f;
    switch (dtype) {
      case lk::kFloat32: static_cast<float*>(made)[i] = v; break;
      case lk::kFloat64: static_cast<double*>(made)[i] = v; break;
      case lk::kFloat16: static_cast<__half*>(made)[i] = __float2half_rn(v); break;
      default: static_cast<__nv_bfloat16*>(made)[i] = __float2bfloat16_rn(v);
    }
  }
  return made;
}

// One element further than an allocation starts, where no 16-byte access may begin.
void* odd(void* made, int64_t size) { return static_cast<char*>(made) + size; }

double* doubles(int64_t count) { return static_cast<double*>(bytes(count, 8)); }

void expect(int status, const char* what) {
  if (status == 0) return;
  std::printf("%s returned %d\n", what, status);
  std::exit(1);
}

void norm(int dtype, int64_t channels, int64_t pool, int64_t parts, int64_t height, int64_t width,
          bool shifted = false) {
  constexpr int64_t tasks = 2, images = 3;
  const int64_t more = shifted ? 1 : 0, size = more * kSizes[dtype];
  const int64_t pixels = images * height * width, windows = images * (height / pool) * (width / pool);
  lk::NormReluPool p{};
  p.tasks = tasks, p.images = images, p.channels = channels, p.height = height, p.width = width, p.pool = pool;
  p.parts = parts, p.eps = 1e-5, p.z_task = pixels * channels, p.gamma_task = channels;
  p.z = odd(numbers(tasks * pixels * channels + more, dtype), size);
  p.gamma = numbers(tasks * channels, dtype), p.beta = numbers(channels, dtype);
  p.mean = bytes(tasks * channels, kWideSizes[dtype]), p.rstd = bytes(tasks * channels, kWideSizes[dtype]);
  p.y = bytes(tasks * windows * channels, kSizes[dtype]);
  p.index = static_cast<uint8_t*>(bytes(tasks * windows * channels, 1));
  p.partial = doubles(tasks * parts * 2 * channels);
  expect(lk_norm_relu_pool(&p, dtype, nullptr), "norm_relu_pool");
  p.gy = p.y, p.y = nullptr, p.sums = doubles(tasks * 2 * channels);
  p.dgamma = bytes(tasks * channels, kSizes[dtype]), p.dbeta = bytes(tasks * channels, kSizes[dtype]);
  p.dz = bytes(tasks * pixels * channels, kSizes[dtype]);
  expect(lk_norm_relu_pool_grad(&p, dtype, nullptr), "norm_relu_pool_grad");
}

void image(int dtype, int64_t inputs, int64_t outputs, int64_t pool, int64_t parts) {
  constexpr int64_t tasks = 2, images = 3, height = 9, width = 8;
  const int64_t K = inputs * 9, windows = images * (height / pool) * (width / pool);
  lk::ImageBlock p{};
  p.tasks = 1, p.images = images, p.inputs = inputs, p.height = height, p.width = width, p.outputs = 1;
  p.kernel_height = p.kernel_width = 3, p.stride_y = p.stride_x = p.dilation_y = p.dilation_x = 1;
  p.padding_y = p.padding_x = 1, p.out_height = height, p.out_width = width, p.pool = 1, p.parts = parts, p.eps = 1e-5;
  p.x = numbers(images * height * width * inputs, dtype);
  p.moments = doubles((K + 1) * (K + 1)), p.partial = doubles(parts * (K + 1) * (K + 1));
  expect(lk_image_moments(&p, dtype, nullptr), "image_moments");
  p.tasks = tasks, p.outputs = outputs, p.pool = pool, p.weight_task = outputs * K, p.beta_task = outputs;
  p.weight = numbers(tasks * outputs * K, dtype);
  p.gamma = numbers(outputs, dtype), p.beta = numbers(tasks * outputs, dtype);
  p.mean = bytes(tasks * outputs, kWideSizes[dtype]), p.rstd = bytes(tasks * outputs, kWideSizes[dtype]);
  p.y = bytes(tasks * windows * outputs, kSizes[dtype]);
  p.index = static_cast<uint8_t*>(bytes(tasks * windows * outputs, 1));
  expect(lk_image_block(&p, dtype, nullptr), "image_block");
  lk::ImageBlock frozen = p;
  frozen.index = nullptr;
  expect(lk_image_block(&frozen, dtype, nullptr), "image_block without index");
  p.gy = p.y, p.y = nullptr, p.partial = doubles(tasks * parts * outputs * (K + 1));
  p.dweight = bytes(tasks * outputs * K, kSizes[dtype]);
  p.dgamma = bytes(tasks * outputs, kSizes[dtype]), p.dbeta = bytes(tasks * outputs, kSizes[dtype]);
  expect(lk_image_block_grad(&p, dtype, nullptr), "image_block_grad");
}

// With `shifted`, the images do not begin where a 16-byte access may.
void moments_by_distance(int dtype, int64_t inputs, int64_t kernel_height, int64_t padding, bool shifted) {
  constexpr int64_t tasks = 2, images = 2, height = 21, width = 37;
  const int64_t K = inputs * kernel_height * 3, more = shifted ? 1 : 0;
  lk::ImageBlock p{};
  p.tasks = tasks, p.images = images, p.inputs = inputs, p.height = height, p.width = width, p.outputs = 1;
  p.kernel_height = kernel_height, p.kernel_width = 3, p.stride_y = p.stride_x = p.dilation_y = p.dilation_x = 1;
  p.padding_y = p.padding_x = padding, p.out_height = height + 2 * padding - kernel_height + 1;
  p.out_width = width + 2 * padding - 2, p.pool = 1, p.parts = 3, p.distance_parts = 3;
  p.x_task = images * height * width * inputs;
  p.x = odd(numbers(tasks * p.x_task + more, dtype), more * kSizes[dtype]);
  p.moments = doubles(tasks * (K + 1) * (K + 1)), p.partial = doubles(tasks * p.parts * (K + 1) * (K + 1));
  p.distances = doubles(tasks * p.distance_parts * (kernel_height * 5 * inputs + 1) * inputs);
  expect(lk_image_moments(&p, dtype, nullptr), "image_moments by distance");
}

void ends_of_a_step(int dtype) {
  constexpr int64_t tasks = 2, images = 5, ways = 37;
  lk::CrossEntropy p{};
  p.tasks = tasks, p.images = images, p.ways = ways, p.logits_task = images * ways, p.labels_task = images;
  int64_t* labels = static_cast<int64_t*>(bytes(tasks * images, 8));
  for (int64_t i = 0; i < tasks * images; ++i) labels[i] = i * 5 - 1;  // the first is no label
  p.logits = numbers(tasks * images * ways, dtype), p.labels = labels;
  p.loss = bytes(tasks, kWideSizes[dtype]), p.gradient = bytes(tasks * images * ways, kSizes[dtype]);
  expect(lk_cross_entropy_grad(&p, dtype, nullptr), "cross_entropy_grad");
  lk::Sgd sgd{};
  sgd.count = lk::kSgdTensors;
  for (int i = 0; i < lk::kSgdTensors; ++i) {
    sgd.rates[i] = 0.1 * (i + 1);
    sgd.sizes[i] = i == 3 ? 8201 : i + 1;
    sgd.parameters[i] = odd(numbers(sgd.sizes[i] + i % 2, dtype), i % 2 * kSizes[dtype]);
    sgd.gradients[i] = numbers(sgd.sizes[i], dtype);
  }
  expect(lk_sgd(&sgd, dtype, nullptr), "sgd");
}

// With `shifted`, no operand begins where a 16-byte access may.
void last_steps(int dtype, int64_t tasks, int64_t inputs, int64_t outputs, int64_t pool, int64_t processors,
                int64_t shared, bool shifted) {
  constexpr int64_t images = 3, height = 5, width = 6, ways = 3;
  const int64_t more = shifted ? 1 : 0;
  const auto made = [&](int64_t count) { return odd(numbers(count + more, dtype), more * kSizes[dtype]); };
  lk::LastSteps p{};
  p.tasks = tasks, p.images = images, p.ways = ways, p.steps = 2, p.pool = 1, p.eps = 1e-5, p.tf32 = shifted;
  p.features = outputs > 0 ? outputs * (height / pool) * (width / pool) : inputs;
  p.x = made(tasks * images * (outputs > 0 ? height * width * inputs : inputs));
  p.x_task = images * (outputs > 0 ? height * width * inputs : inputs);
  if (outputs > 0) {
    p.inputs = inputs, p.height = p.out_height = height, p.width = p.out_width = width, p.outputs = outputs;
    p.kernel_height = p.kernel_width = 3, p.stride_y = p.stride_x = p.dilation_y = p.dilation_x = 1;
    p.padding_y = p.padding_x = 1, p.pool = pool;
  }
  int64_t* labels = static_cast<int64_t*>(bytes(images, 8));
  for (int64_t i = 0; i < images; ++i) labels[i] = i;
  p.labels = labels;
  const int64_t sizes[] = {outputs * inputs * 9, outputs, outputs, ways * p.features, ways};
  for (int i = outputs > 0 ? 0 : lk::kHead; i < lk::kMoved; ++i) {
    p.from_task[i] = i % 2 ? sizes[i] : 0;
    p.from[i] = made((i % 2 ? tasks : 1) * sizes[i]);
    p.to[i] = bytes(tasks * sizes[i], kSizes[dtype]);
    p.rates[0][i] = 0.1, p.rates[1][i] = 0.2;
  }
  p.rows = bytes(3 * tasks, kWideSizes[dtype]);
  expect(lk_last_steps_plan(&p, dtype, processors, shared), "last_steps_plan");
  p.scratch = bytes(tasks * p.scratch_bytes, 1);
  p.counters = static_cast<uint32_t*>(bytes(tasks, 4));
  expect(lk_last_steps(&p, dtype, nullptr), "last_steps");
}

}  // namespace

int main() {
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (int64_t pool = 1; pool <= 2; ++pool) {
      norm(dtype, 5, pool, 2, 7, 5);
      norm(dtype, 16, pool, 3, 5, 8);
      norm(dtype, 16, pool, 1, 4, 3, true);
      norm(dtype, 72, pool, 1, 2, 2);
      image(dtype, 3, 12, pool, 3);
      image(dtype, 1, 5, pool, 1);
    }
    moments_by_distance(dtype, 3, 3, 1, false);
    moments_by_distance(dtype, 3, 2, 0, true);
    moments_by_distance(dtype, 1, 10, 2, dtype == 0);
    ends_of_a_step(dtype);
    const int64_t all = 227 * 1024;
    const bool first = dtype % 2 == 0;  // each case with shifted operands in half of the dtypes
    last_steps(dtype, 1, 4, 9, 2, 6, all, first);
    last_steps(dtype, 2, 8, 6, 1, 4, kWideSizes[dtype] * 2600, !first);
    last_steps(dtype, 1, 5, 33, 2, 2, all, !first);
    last_steps(dtype, 1, 21, 0, 1, 3, all, first);
    owned.clear();
  }
  std::puts("ok");
}
