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
constexpr int64_t kNoStrides[4] = {};  // of a weight that is not read

// Whether there is a kernel, whatever the number of images.
bool affine_block_takes(Convolution c, int64_t pool) {
  c.images = 1;
  return frozen_block_takes(c, pool);
}

// What a pass reads in place of a block's weight, and its number of values: by patches the filters, where the bias is in
// them, else the weight transformed.
template <typename T>
int64_t prepared(const Convolution& c, int64_t pool) {
  if (ImageConvolution<T>::takes(c, pool)) return ImageConvolution<T>::affine_filters(c);
  return WinogradConvolution<T>(c, nullptr, kNoStrides).transformed();
}

// weight [outputs, inputs, kh, kw] and bias dense
template <typename T>
void prepare(const Convolution& c, int64_t pool, const T* weight, const T* bias, T* to) {
  if (ImageConvolution<T>::takes(c, pool)) return ImageConvolution<T>::affine_filters(c, weight, bias, to);
  const int64_t dense[] = {c.inputs * 9, 9, 3, 1};
  WinogradConvolution<T>(c, const_cast<T*>(weight), dense).transform(to);
}

// x [images, ...] with its strides -> y, dense channels-last; ready: from `prepare`
template <typename T>
void run_affine_block(const Convolution& c, int64_t pool, const T* x, const int64_t* strides, const T* ready, const T* bias,
                      T* y, Arena& arena) {
  const Arena::Mark mark = arena.mark();
  if (ImageConvolution<T>::takes(c, pool)) {
    const ImageConvolution<T> images(c, pool, x, strides, arena, false);
    images.apply(ready, y, arena.take<uint8_t>(c.images * (c.rows / pool) * (c.columns / pool) * c.outputs));
  } else {
    WinogradConvolution<T>(c, nullptr, kNoStrides).affine(x, ready, bias, y, arena);
  }
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
      scalar_t* const ready = (*arena).take<scalar_t>(prepared<scalar_t>(c, pool));
      prepare<scalar_t>(c, pool, own(weight, task), own(bias, task), ready);
      run_affine_block<scalar_t>(c, pool, own(x, task), x.strides().data() + 1, ready, own(bias, task),
                                 const_cast<scalar_t*>(own(y, task)), *arena);
    });
  });
  return y;
}

// A chain of blocks over images of one size, and its linear layer.
struct AffineChain {
  std::vector<Convolution> convolutions;
  std::vector<int64_t> pools;
  int64_t channels, pixels, ways;  // of the features, and of the logits

  int64_t features() const { return channels * pixels; }

  // size: of the images [N, C, H, W]; given: weight and bias per block and of the linear layer; geometry: the numbers of each
  // block one after another
  AffineChain(const Operands& operands, const char* name, at::IntArrayRef size, at::TensorList given,
              at::IntArrayRef geometry) {
    const int64_t blocks = int64_t(geometry.size()) / kNumbers;
    TORCH_CHECK(blocks > 0 && int64_t(geometry.size()) == kNumbers * blocks && int64_t(given.size()) == 2 * blocks + 2, name,
                ": a weight and a bias per block and of the linear layer, and ", kNumbers, " numbers per block, got ",
                given.size(), " parameters and ", geometry.size(), " numbers");
    channels = size[1];
    int64_t height = size[2], width = size[3];
    for (int64_t b = 0; b < blocks; ++b) {
      const at::IntArrayRef g = geometry.slice(b * kNumbers, kNumbers);
      const at::Tensor& weight = given[2 * b];
      operands.check("the weight", weight, {kSome, channels, kSome, kSome}, b);
      const Convolution c = operands.convolution({size[0], channels, height, width}, weight.sizes(), g.data(), 1, g[6]);
      operands.check("the bias", given[2 * b + 1], {c.outputs}, b);
      TORCH_CHECK(affine_block_takes(c, g[6]), name, ": no kernel for block ", b, " with a weight ", weight.sizes(),
                  " over ", channels, "x", height, "x", width, " with pool ", g[6]);
      convolutions.push_back(c), pools.push_back(g[6]);
      channels = c.outputs, height = c.rows / g[6], width = c.columns / g[6];
    }
    pixels = height * width, ways = given[2 * blocks].size(0);
    operands.check("the weight", given[2 * blocks], {kSome, features()}, blocks);
    operands.check("the bias", given[2 * blocks + 1], {ways}, blocks);
  }

  // The linear layer's weight counts features by (channel, pixel), they lie by (pixel, channel); to [features, wide]
  template <typename T>
  void turn(const T* weight, T* to) const {
    const int64_t wide = up(ways, kLanes);
    std::fill(to, to + features() * wide, T(0));
    for (int64_t way = 0; way < ways; ++way)
      for (int64_t o = 0; o < channels; ++o)
        for (int64_t at = 0; at < pixels; ++at)
          to[(at * channels + o) * wide + way] = weight[way * features() + o * pixels + at];
  }
};

// What `affine_chain` makes of its parameters in each call, for images of one size [C, H, W]: a tensor per block, and one of
// the linear layer.
std::vector<at::Tensor> affine_chain_prepare(at::TensorList given, at::IntArrayRef geometry, at::IntArrayRef size) {
  TORCH_CHECK(!given.empty() && given[0].defined(), "affine_chain_prepare: no parameters");
  const Operands operands("affine_chain_prepare", given[0], {});
  operands.check_count("size", size.size(), 3);
  for (const int64_t side : size) TORCH_CHECK(side > 0, "affine_chain_prepare: size must be positive numbers, got ", size);
  const AffineChain chain(operands, "affine_chain_prepare", {1, size[0], size[1], size[2]}, given, geometry);
  std::vector<at::Tensor> made;
  AT_DISPATCH_FLOATING_TYPES(given[0].scalar_type(), "affine_chain_prepare", [&] {
    const auto dense = [&](int64_t place) { return given[place].contiguous(); };
    const int64_t blocks = int64_t(chain.pools.size());
    for (int64_t b = 0; b < blocks; ++b) {
      const Convolution& c = chain.convolutions[b];
      made.push_back(at::empty({prepared<scalar_t>(c, chain.pools[b])}, given[0].options()));
      const at::Tensor weight = dense(2 * b), bias = dense(2 * b + 1);
      prepare<scalar_t>(c, chain.pools[b], weight.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(),
                        made.back().mutable_data_ptr<scalar_t>());
    }
    made.push_back(at::empty({chain.features() * up(chain.ways, kLanes)}, given[0].options()));
    const at::Tensor weight = dense(2 * blocks);
    chain.turn(weight.const_data_ptr<scalar_t>(), made.back().mutable_data_ptr<scalar_t>());
  });
  return made;
}

// ready: from `affine_chain_prepare` for the same parameters and images of this size, or nothing. -> [N, ways]
at::Tensor affine_chain(const at::Tensor& x_, at::TensorList given, at::IntArrayRef geometry, at::TensorList ready) {
  const Operands operands("affine_chain", x_, {});
  operands.check("x", x_, {kSome, kSome, kSome, kSome});
  const AffineChain chain(operands, "affine_chain", x_.sizes(), given, geometry);
  const int64_t images = x_.size(0), blocks = int64_t(chain.pools.size()), ways = chain.ways, wide = up(ways, kLanes);
  if (!ready.empty()) operands.check_count("ready", ready.size(), blocks + 1);
  const bool by_patches = ImageConvolution<float>::takes(chain.convolutions[0], chain.pools[0]);
  const at::Tensor x = by_patches ? x_ : x_.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor logits = at::empty({images, ways}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "affine_chain", [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Borrowed borrowed;
    Arena& arena = *borrowed;
    // What is ready at a place, or is made there by f.
    const auto taken = [&](int64_t place, int64_t values, const auto& f) -> const scalar_t* {
      if (!ready.empty()) {
        operands.check_dense("ready", ready[place], {values});
        return ready[place].const_data_ptr<scalar_t>();
      }
      scalar_t* const made = arena.take<scalar_t>(values);
      const at::Tensor weight = given[2 * place].contiguous();
      f(weight.const_data_ptr<scalar_t>(), made);
      return made;
    };
    const scalar_t* y = x.const_data_ptr<scalar_t>();
    const int64_t* strides = x.strides().data();
    for (int64_t b = 0; b < blocks; ++b) {
      const Convolution& c = chain.convolutions[b];
      const int64_t pool = chain.pools[b];
      // Dense from the second block on; a block by its patches reads by strides.
      const int64_t dense[] = {c.height * c.width * c.inputs, 1, c.width * c.inputs, c.inputs};
      const at::Tensor own = given[2 * b + 1].contiguous();
      const scalar_t* const bias = own.const_data_ptr<scalar_t>();
      const scalar_t* const filters = taken(b, prepared<scalar_t>(c, pool), [&](const scalar_t* weight, scalar_t* made) {
        prepare<scalar_t>(c, pool, weight, bias, made);
      });
      scalar_t* const to = arena.take<scalar_t>(images * (c.rows / pool) * (c.columns / pool) * c.outputs);
      run_affine_block<scalar_t>(c, pool, y, b == 0 ? strides : dense, filters, bias, to, arena);
      y = to;
    }
    const int64_t features = chain.features();
    const scalar_t* const turned =
        taken(blocks, features * wide, [&](const scalar_t* weight, scalar_t* made) { chain.turn(weight, made); });
    scalar_t* const wide_logits = arena.take<scalar_t>(images * wide);
    multiply<scalar_t>({y, features, 1, turned, wide, wide_logits, wide, images, wide, features, scalar_t(1), false});
    scalar_t* const to = logits.mutable_data_ptr<scalar_t>();
    const at::Tensor shift = given[2 * blocks + 1].contiguous();
    const scalar_t* const bias = shift.const_data_ptr<scalar_t>();
    for (int64_t n = 0; n < images; ++n)
      for (int64_t way = 0; way < ways; ++way) to[n * ways + way] = wide_logits[n * wide + way] + bias[way];
  });
  return logits;
}

TORCH_LIBRARY_FRAGMENT(lambda_kernels, m) {
  // x [1 or T, N, C, H, W], weight [1 or T, O, C, kh, kw], bias [1 or T, O] -> max-pool of ReLU of the convolution
  m.def("affine_block(Tensor x, Tensor weight, Tensor bias, int[] geometry) -> Tensor");
  m.def("affine_chain_prepare(Tensor[] parameters, int[] geometry, int[] size) -> Tensor[]");
  m.def("affine_chain(Tensor x, Tensor[] parameters, int[] geometry, Tensor[] ready) -> Tensor");
}

TORCH_LIBRARY_IMPL(lambda_kernels, CPU, m) {
  m.impl("affine_block", &Door<&affine_block>::call);
  m.impl("affine_chain_prepare", &Door<&affine_chain_prepare>::call);
  m.impl("affine_chain", &Door<&affine_chain>::call);
}

}  // namespace
}  // namespace lk
