// The first block of a network from the moments of its patches: what torch's tensors have to do with the kernels.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "block.h"
#include "cpu/image_block.h"

namespace lk {
namespace {

constexpr int64_t kMostTaps = 32;
constexpr int64_t kSlabs = 32;  // a sum's parts, whatever the number of threads, so that it has one order

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// second moments [K + 1, K + 1] -> average [K] and covariance [K, K] of the patches
struct Patches {
  int64_t taps;
  const double* moments;
  double count;
  std::vector<double> average, covariance;

  explicit Patches(const at::Tensor& second)
      : taps(second.size(0) - 1), moments(second.const_data_ptr<double>()), count(moments[(taps + 1) * (taps + 1) - 1]),
        average(taps), covariance(taps * taps) {
    for (int64_t i = 0; i < taps; ++i) average[i] = moments[i * (taps + 1) + taps] / count;
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < taps; ++j)
        covariance[i * taps + j] = moments[i * (taps + 1) + j] / count - average[i] * average[j];
  }

  // to [K] = covariance w
  template <typename T>
  void apply(const T* w, double* to) const {
    std::fill(to, to + taps, 0.0);
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < taps; ++j) to[j] += double(w[i]) * covariance[i * taps + j];
  }
};

}  // namespace

bool Images::takes(at::IntArrayRef weight, int64_t groups, int64_t pool) {
  return groups == 1 && weight[1] * weight[2] * weight[3] <= kMostTaps && (pool == 1 || pool == 2);
}

Images::Images(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, int64_t pool)
    : stride_(stride.vec()), pool_(pool), taps_(x.size(1) * kernel[0] * kernel[1]) {
  TORCH_CHECK(taps_ <= kMostTaps && (pool == 1 || pool == 2) && x.numel() > 0, "image_block: a kernel of ", kernel[0], "x",
              kernel[1], " over images ", x.sizes(), " with pool ", pool, ": at most ", kMostTaps,
              " numbers a patch and a pool of 1 or 2");
  const bool pads = padding[0] > 0 || padding[1] > 0;
  const at::Tensor whole = pads ? at::constant_pad_nd(x, {padding[1], padding[1], padding[0], padding[0]}) : x;
  // The norm takes back any constant: images far from zero lose nothing to rounding when they are moved there first.
  const at::Tensor levels = at::mean(x, {0, 2, 3}, true);
  padded_ = at::sub(whole, levels).contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t inputs = x.size(1), width = padded_.size(3);
  out_rows_ = (padded_.size(2) - dilation[0] * (kernel[0] - 1) - 1) / stride[0] + 1;
  out_columns_ = (width - dilation[1] * (kernel[1] - 1) - 1) / stride[1] + 1;
  offsets_.assign(up(taps_, kImageTaps), 0);
  const at::Tensor doubles = levels.to(at::kDouble);
  for (int64_t k = 0; k < taps_; ++k) {
    const int64_t c = k / (kernel[0] * kernel[1]), i = k / kernel[1] % kernel[0], j = k % kernel[1];
    levels_.push_back(doubles.const_data_ptr<double>()[c]);
    offsets_[k] = (i * dilation[0] * width + j * dilation[1]) * inputs + c;
  }
}

template <typename P>
void Images::describe(P& p, int64_t outputs) const {
  p.images = padded_.size(0), p.inputs = padded_.size(1), p.height = padded_.size(2), p.width = padded_.size(3);
  p.taps = taps_, p.padded_taps = int64_t(offsets_.size()), p.offsets = offsets_.data();
  p.stride_y = stride_[0], p.stride_x = stride_[1], p.pool = pool_;
  p.out_rows = out_rows_, p.out_columns = out_columns_, p.rows = out_rows_ / pool_, p.columns = out_columns_ / pool_;
  p.outputs = outputs, p.padded_outputs = up(outputs, kImageLanes);
  p.slabs = std::clamp<int64_t>(p.images * p.rows, 1, kSlabs);
}

at::Tensor Images::moments() const {
  const int64_t side = taps_ + 1;
  at::Tensor partial, result = at::zeros({side, side}, padded_.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(padded_.scalar_type(), "image_moments", [&] {
    ImageBlock<scalar_t> p{};
    describe(p, 0);
    p.x = padded_.const_data_ptr<scalar_t>();
    partial = at::empty({p.slabs, side, side}, result.options());
    p.partial = partial.mutable_data_ptr<double>();
    const auto& kernels = image_block_kernels<scalar_t>();
    at::parallel_for(0, p.slabs, 1, [&](int64_t begin, int64_t end) { kernels.moments(p, begin, end); });
  });
  const double* from = partial.const_data_ptr<double>();
  double* to = result.mutable_data_ptr<double>();
  for (int64_t slab = 0; slab < partial.size(0); ++slab, from += side * side)
    for (int64_t i = 0; i < side * side; ++i) to[i] += from[i];
  // Back to where the images were: with q = p - level, p^T p = q^T q + level sum(q)^T + sum(q) level^T + M level level^T.
  double* sums = to + taps_ * side;
  const double count = sums[taps_];
  for (int64_t i = 0; i < taps_; ++i)
    for (int64_t j = 0; j < taps_; ++j)
      to[i * side + j] += levels_[i] * sums[j] + sums[i] * levels_[j] + count * levels_[i] * levels_[j];
  for (int64_t i = 0; i < taps_; ++i) to[i * side + taps_] = sums[i] += count * levels_[i];
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> Images::forward(const at::Tensor& weight_, const at::Tensor& gamma_,
                                                                           const at::Tensor& beta_,
                                                                           const at::Tensor& moments, double eps) const {
  const at::Tensor weight = weight_.contiguous(), gamma = gamma_.contiguous(), beta = beta_.contiguous();
  const int64_t outputs = weight.size(0);
  const int64_t shape[] = {padded_.size(0), outputs, out_rows_ / pool_, out_columns_ / pool_};
  const auto options = padded_.options();
  at::Tensor y = at::empty(shape, options, at::MemoryFormat::ChannelsLast);
  at::Tensor index = at::empty(shape, options.dtype(at::kByte), at::MemoryFormat::ChannelsLast);
  at::Tensor mean = at::empty({outputs}, options), rstd = at::empty({outputs}, options);
  const Patches patches(moments);
  AT_DISPATCH_FLOATING_TYPES(padded_.scalar_type(), "image_block", [&] {
    ImageBlock<scalar_t> p{};
    describe(p, outputs);
    // weight by tap, then mean, scale and beta, all with the outputs rounded up
    const at::Tensor packed = at::zeros({taps_ + 3, p.padded_outputs}, options);
    scalar_t* rows = packed.mutable_data_ptr<scalar_t>();
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    std::vector<double> along(taps_);
    for (int64_t o = 0; o < outputs; ++o, w += taps_) {
      double m = 0.0, level = 0.0, variance = 0.0;
      patches.apply(w, along.data());
      for (int64_t k = 0; k < taps_; ++k) {
        m += double(w[k]) * patches.average[k];
        level += double(w[k]) * (patches.average[k] - levels_[k]);
        variance += double(w[k]) * along[k];
        rows[k * p.padded_outputs + o] = w[k];
      }
      const double r = 1.0 / std::sqrt(std::max(variance, 0.0) + eps);
      mean.mutable_data_ptr<scalar_t>()[o] = scalar_t(m);
      rows[taps_ * p.padded_outputs + o] = scalar_t(level);
      rstd.mutable_data_ptr<scalar_t>()[o] = scalar_t(r);
      rows[(taps_ + 1) * p.padded_outputs + o] = gamma.const_data_ptr<scalar_t>()[o] * scalar_t(r);
      rows[(taps_ + 2) * p.padded_outputs + o] = beta.const_data_ptr<scalar_t>()[o];
    }
    p.x = padded_.const_data_ptr<scalar_t>();
    p.weight = rows;
    p.mean = rows + taps_ * p.padded_outputs;
    p.scale = p.mean + p.padded_outputs;
    p.beta = p.scale + p.padded_outputs;
    p.y = y.mutable_data_ptr<scalar_t>();
    p.index = index.mutable_data_ptr<uint8_t>();
    const auto& kernels = image_block_kernels<scalar_t>();
    const int64_t work = p.columns * pool_ * pool_ * taps_ * outputs;  // multiply-adds of an item
    at::parallel_for(0, p.images * p.rows, std::max<int64_t>(1, 100000 / work),
                     [&](int64_t begin, int64_t end) { kernels.apply(p, begin, end); });
  });
  return {y, index, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Images::backward(const at::Tensor& gy_, const at::Tensor& weight_,
                                                                const at::Tensor& gamma_, const at::Tensor& index_,
                                                                const at::Tensor& mean_, const at::Tensor& rstd_,
                                                                const at::Tensor& moments) const {
  const auto layout = at::MemoryFormat::ChannelsLast;
  const at::Tensor gy = gy_.contiguous(layout), index = index_.contiguous(layout), weight = weight_.contiguous();
  const at::Tensor gamma = gamma_.contiguous(), mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t outputs = weight.size(0);
  at::Tensor dweight = at::empty(weight.sizes(), weight.options()), dgamma = at::empty({outputs}, gamma.options()),
             dbeta = at::empty({outputs}, gamma.options());
  const Patches patches(moments);
  AT_DISPATCH_FLOATING_TYPES(padded_.scalar_type(), "image_block_grad", [&] {
    ImageBlock<scalar_t> p{};
    describe(p, outputs);
    const int64_t size = (p.padded_taps + 1) * p.padded_outputs;
    const at::Tensor partial = at::empty({p.slabs, size}, gy.options().dtype(at::kDouble));
    p.x = padded_.const_data_ptr<scalar_t>();
    p.gy = gy.const_data_ptr<scalar_t>();
    p.index = const_cast<uint8_t*>(index.const_data_ptr<uint8_t>());
    p.partial = partial.mutable_data_ptr<double>();
    const auto& kernels = image_block_kernels<scalar_t>();
    const int64_t work = p.images * p.rows * p.columns * pool_ * pool_ * taps_ * outputs / p.slabs;
    at::parallel_for(0, p.slabs, std::max<int64_t>(1, 100000 / work),
                     [&](int64_t begin, int64_t end) { kernels.reduce(p, begin, end); });
    for (int64_t slab = 1; slab < p.slabs; ++slab)
      for (int64_t i = 0; i < size; ++i) p.partial[i] += p.partial[slab * size + i];
    // With A = g^T p: dbeta = sum(g), dgamma = rstd (<w, A> - mean dbeta),
    // dw = gamma rstd (A - dbeta average - dgamma rstd covariance w)
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    scalar_t* dw = dweight.mutable_data_ptr<scalar_t>();
    std::vector<double> along(taps_);
    for (int64_t o = 0; o < outputs; ++o, w += taps_, dw += taps_) {
      const double sum = p.partial[p.padded_taps * p.padded_outputs + o];
      const double r = double(rstd.const_data_ptr<scalar_t>()[o]), g = double(gamma.const_data_ptr<scalar_t>()[o]);
      double centred = 0.0;  // <w, A - dbeta average>
      patches.apply(w, along.data());
      for (int64_t k = 0; k < taps_; ++k) {
        double& a = p.partial[k * p.padded_outputs + o];
        a -= sum * (patches.average[k] - levels_[k]);
        centred += double(w[k]) * a;
      }
      const double slope = centred * r;
      for (int64_t k = 0; k < taps_; ++k)
        dw[k] = scalar_t(g * r * (p.partial[k * p.padded_outputs + o] - slope * r * along[k]));
      dgamma.mutable_data_ptr<scalar_t>()[o] = scalar_t(slope);
      dbeta.mutable_data_ptr<scalar_t>()[o] = scalar_t(sum);
    }
  });
  return {dweight, dgamma, dbeta};
}

}  // namespace lk
