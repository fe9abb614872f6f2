// Blocks whose norms have fixed statistics, which are part of weight and bias, without a gradient: convolution, ReLU and
// max-pool in one pass over the images; and a chain of such blocks with a linear layer. An image's result is the same bits
// whatever images are beside it: no choice depends on their number, and each sum is of one image's values in one order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "arena.h"
#include "checks.h"
#include "frozen_block.h"
#include "product.h"
#include "tasks.h"
#include "tensors.h"

namespace lk {
namespace {

constexpr int64_t kNumbers = 7;  // of a block: stride, padding, dilation, vertical and horizontal each; pool

// Whether there is a kernel, whatever the number of images.
bool affine_block_takes(Convolution c, int64_t pool) {
  c.images = 1;
  return frozen_block_takes(c, pool);
}

// x [images, ...] with its strides -> y, dense channels-last; weight [outputs, inputs, kh, kw] and bias dense
template <typename T>
void run_affine_block(const Convolution& c, int64_t pool, const T* x, const int64_t* strides, const T* weight, const T* bias,
                      T* y, Arena& arena) {
  const Arena::Mark mark = arena.mark();
  const int64_t O = c.outputs, pixels = c.images * (c.rows / pool) * (c.columns / pool);
  if (ImageConvolution<T>::takes(c, pool)) {
    const ImageConvolution<T> images(c, pool, x, strides, arena, false);
    images.affine(weight, bias, y, arena.take<uint8_t>(pixels * O), arena);
    return arena.rewind(mark);
  }
  const int64_t dense[] = {c.inputs * 9, 9, 3, 1};
  const WinogradConvolution<T> filter(c, const_cast<T*>(weight), dense);
  bool* const negative = arena.take<bool>(O);
  double *const mean = arena.take<double>(O), *const squares = arena.take<double>(O), seen = 0.0;
  for (int64_t o = 0; o < O; ++o) negative[o] = false, mean[o] = squares[o] = 0.0;
  filter.survey(x, negative, y, seen, mean, squares, arena);
  at::parallel_for(0, pixels, 1 + 16384 / O, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      for (int64_t o = 0; o < O; ++o) {
        const T v = y[at * O + o] + bias[o];
        y[at * O + o] = v < T(0) ? T(0) : v;
      }
  });
  arena.rewind(mark);
}

at::Tensor affine_block(const at::Tensor& x_, const at::Tensor& weight_, const at::Tensor& bias_, at::IntArrayRef geometry) {
  const Operands operands("affine_block", x_, {&x_, &weight_, &bias_});
  const Convolution c = operands.block(x_, weight_, geometry);
  operands.check("bias", bias_, {kOwn, c.outputs});
  const int64_t tasks = operands.tasks(), pool = geometry[6];
  TORCH_CHECK(affine_block_takes(c, pool), "affine_block: no kernel for a weight ", weight_.sizes(), " over images ",
              x_.sizes(), " with pool ", pool);
  const at::Tensor x = ImageConvolution<float>::takes(c, pool) ? x_ : channels_last(x_);
  const at::Tensor weight = weight_.contiguous(), bias = bias_.contiguous();
  at::Tensor y = empty_images(tasks, c.images, c.outputs, c.rows / pool, c.columns / pool, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "affine_block", [&] {
    const auto own = [](const at::Tensor& t, int64_t task) {
      return t.const_data_ptr<scalar_t>() + (t.size(0) == 1 ? 0 : task * t.stride(0));
    };
    for_each_task(tasks, [&](int64_t task, Interrupt&) {
      const Borrowed arena;
      run_affine_block<scalar_t>(c, pool, own(x, task), x.strides().data() + 1, own(weight, task), own(bias, task),
                                 const_cast<scalar_t*>(own(y, task)), *arena);
    });
  });
  return y;
}

// parameters: weight and bias per block, then weight [ways, F] and bias [ways] of the linear layer; geometry: the numbers of
// each block one after another. -> [N, ways]
at::Tensor affine_chain(const at::Tensor& x_, at::TensorList given, at::IntArrayRef geometry) {
  const int64_t blocks = int64_t(geometry.size()) / kNumbers;
  TORCH_CHECK(blocks > 0 && int64_t(geometry.size()) == kNumbers * blocks && int64_t(given.size()) == 2 * blocks + 2,
              "affine_chain: a weight and a bias per block and of the linear layer, and ", kNumbers,
              " numbers per block, got ", given.size(), " parameters and ", geometry.size(), " numbers");
  const Operands operands("affine_chain", x_, {});
  operands.check("x", x_, {kSome, kSome, kSome, kSome});
  std::vector<Convolution> convolutions;
  std::vector<int64_t> pools;
  int64_t channels = x_.size(1), height = x_.size(2), width = x_.size(3);
  for (int64_t b = 0; b < blocks; ++b) {
    const at::IntArrayRef g = geometry.slice(b * kNumbers, kNumbers);
    const at::Tensor& weight = given[2 * b];
    operands.check("the weight", weight, {kSome, channels, kSome, kSome}, b);
    const Convolution c = operands.convolution({x_.size(0), channels, height, width}, weight.sizes(), g.data(), 1, g[6]);
    operands.check("the bias", given[2 * b + 1], {c.outputs}, b);
    TORCH_CHECK(affine_block_takes(c, g[6]), "affine_chain: no kernel for block ", b, " with a weight ", weight.sizes(),
                " over ", channels, "x", height, "x", width, " with pool ", g[6]);
    convolutions.push_back(c), pools.push_back(g[6]);
    channels = c.outputs, height = c.rows / g[6], width = c.columns / g[6];
  }
  const int64_t images = x_.size(0), features = channels * height * width;
  operands.check("the weight", given[2 * blocks], {kSome, features}, blocks);
  operands.check("the bias", given[2 * blocks + 1], {given[2 * blocks].size(0)}, blocks);
  std::vector<at::Tensor> parameters;
  for (const at::Tensor& p : given) parameters.push_back(p.contiguous());
  const at::Tensor &head = parameters[2 * blocks], &shift = parameters.back();
  const bool by_patches = ImageConvolution<float>::takes(convolutions[0], pools[0]);
  const at::Tensor x = by_patches ? x_ : x_.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t ways = head.size(0), wide = up(ways, kLanes);
  at::Tensor logits = at::empty({images, ways}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "affine_chain", [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Borrowed borrowed;
    Arena& arena = *borrowed;
    const scalar_t* y = x.const_data_ptr<scalar_t>();
    const int64_t* strides = x.strides().data();
    for (int64_t b = 0; b < blocks; ++b) {
      const Convolution& c = convolutions[b];
      // Dense from the second block on; a block by its patches reads by strides.
      const int64_t dense[] = {c.height * c.width * c.inputs, 1, c.width * c.inputs, c.inputs};
      scalar_t* const to = arena.take<scalar_t>(images * (c.rows / pools[b]) * (c.columns / pools[b]) * c.outputs);
      run_affine_block<scalar_t>(c, pools[b], y, b == 0 ? strides : dense, parameters[2 * b].const_data_ptr<scalar_t>(),
                                 parameters[2 * b + 1].const_data_ptr<scalar_t>(), to, arena);
      y = to;
    }
    // The weight counts features by (channel, pixel), they lie by (pixel, channel).
    scalar_t *const turned = arena.take<scalar_t>(features * wide), *const wide_logits = arena.take<scalar_t>(images * wide);
    const scalar_t* const weight = head.const_data_ptr<scalar_t>();
    std::fill(turned, turned + features * wide, scalar_t(0));
    for (int64_t way = 0; way < ways; ++way)
      for (int64_t o = 0; o < channels; ++o)
        for (int64_t at = 0; at < height * width; ++at)
          turned[(at * channels + o) * wide + way] = weight[way * features + o * height * width + at];
    multiply<scalar_t>({y, features, 1, turned, wide, wide_logits, wide, images, wide, features, scalar_t(1), false});
    scalar_t* const to = logits.mutable_data_ptr<scalar_t>();
    const scalar_t* const bias = shift.const_data_ptr<scalar_t>();
    for (int64_t n = 0; n < images; ++n)
      for (int64_t way = 0; way < ways; ++way) to[n * ways + way] = wide_logits[n * wide + way] + bias[way];
  });
  return logits;
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  // x [1 or T, N, C, H, W], weight [1 or T, O, C, kh, kw], bias [1 or T, O] -> max-pool of ReLU of the convolution
  m.def("affine_block(Tensor x, Tensor weight, Tensor bias, int[] geometry) -> Tensor");
  m.def("affine_chain(Tensor x, Tensor[] parameters, int[] geometry) -> Tensor");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("affine_block", &Door<&affine_block>::call);
  m.impl("affine_chain", &Door<&affine_chain>::call);
}

}  // namespace
}  // namespace lk
