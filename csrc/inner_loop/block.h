// A fused block of the inner loop: convolution, norm, ReLU and max-pool, and a step of their parameters.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "arena.h"
#include "frozen_block.h"
#include "image_block.h"
#include "inner_loop/convolution_layer.h"
#include "norm_relu_pool.h"
#include "winograd.h"

namespace lk {

// One task's parameters of a block. Vectors are dense.
template <typename T>
struct Block {
  Convolution c;
  int64_t pool;
  double eps;
  bool update_weight, update_gamma, update_beta;
  bool below;  // an updated parameter lies in a block before this one, so the input gradient is needed
  at::Tensor weight;
  T *gamma, *beta;

  std::unique_ptr<ConvolutionLayer<T>> layer;
  std::optional<ImageConvolution<T>> images;   // in place of the layer: of a first block
  std::optional<Patches> patches;    // of the images
  T *dense_weight, *dweight;         // [O, K], with the images
  NormReluPool<T> norm;
  T* gx;                             // as the input, where there is a block below

  bool updated() const { return update_weight || update_gamma || update_beta; }
  int64_t inputs() const { return c.images * c.height * c.width * c.inputs; }
  int64_t outputs() const { return c.images * (c.rows / pool) * (c.columns / pool) * c.outputs; }

  // What a forward pass needs, and with `steps` > 0 a backward pass. x: of the images where this is the first block;
  // one_rate: whether all steps have the same rate for the weight.
  void lay_out(const at::Tensor* x, int64_t steps, bool one_rate, Arena& arena) {
    if (x != nullptr && ImageConvolution<T>::takes(c, pool)) {
      const int64_t taps = c.inputs * c.kernel[0] * c.kernel[1];
      images.emplace(c, pool, x->const_data_ptr<T>(), x->strides().data(), arena);
      double* const moments = arena.take<double>((taps + 1) * (taps + 1));
      images->moments(moments, arena);
      patches.emplace(taps, moments);
      dense_weight = arena.take<T>(c.outputs * taps), dweight = arena.take<T>(c.outputs * taps);
      home().copy_(weight);
    } else {
      T* const data = const_cast<T*>(weight.const_data_ptr<T>());
      const int64_t* strides = weight.strides().data();
      if (update_weight && !below && PixelLayer<T>::takes(c, steps)) {
        layer = std::make_unique<PixelLayer<T>>(c, data, strides, steps, one_rate, arena);
      } else if (WinogradConvolution<T>::takes(c)) {
        layer = std::make_unique<WinogradLayer<T>>(c, data, strides, update_weight, arena);
      } else {
        layer = std::make_unique<LibraryLayer<T>>(c, weight, update_weight, below);
      }
    }
    norm = {};
    norm.tasks = 1, norm.images = c.images, norm.channels = c.outputs, norm.height = c.rows, norm.width = c.columns;
    norm.pool = pool, norm.eps = eps, norm.gamma = gamma, norm.beta = beta;
    set_slabs(norm);
    norm.y = arena.take<T>(outputs()), norm.index = arena.take<uint8_t>(outputs());
    norm.mean = arena.take<T>(c.outputs), norm.rstd = arena.take<T>(c.outputs);
    norm.dgamma = arena.take<T>(c.outputs), norm.dbeta = arena.take<T>(c.outputs);
    norm.partial = arena.take<double>(c.images * norm.slabs * 2 * c.outputs);
    gx = below ? arena.take<T>(inputs()) : nullptr;
  }

  // Without a gradient: x [N, H, W, C] (given: the images, where this is the first block) -> y
  void run(const T* x, const at::Tensor* given, T* y, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    if (frozen_block_takes(c, pool)) {
      const bool strided = given != nullptr && ImageConvolution<T>::takes(c, pool);
      const int64_t own[] = {c.height * c.width * c.inputs, 1, c.width * c.inputs, c.inputs};
      run_frozen_block<T>({c, pool, eps, strided ? given->const_data_ptr<T>() : x, strided ? given->strides().data() : own,
                           weight.const_data_ptr<T>(), weight.strides().data(), gamma, beta, y, arena.take<T>(c.outputs),
                           arena.take<T>(c.outputs)},
                          arena);
    } else {
      lay_out(nullptr, 0, true, arena);
      norm.y = y;
      forward(x, arena);
      layer.reset();
    }
    arena.rewind(mark);
  }

  const T* forward(const T* x, Arena& arena) {
    if (images) {
      images->block(dense_weight, gamma, beta, *patches, eps, norm.y, norm.index, norm.mean, norm.rstd, arena);
    } else {
      norm.z = layer->forward(x);
      run_norm_relu_pool(norm);
    }
    return norm.y;
  }

  // Updates the parameters whose rate is not 0, rates: of weight, gamma, beta; -> gx. dz: as z, scratch.
  const T* step(const T* gy, T* dz, const T* rates, Arena& arena) {
    const bool moves_weight = update_weight && rates[0] != T(0);
    if (images) {
      images->block_grad(gy, dense_weight, gamma, norm.index, norm.rstd, *patches, dweight, norm.dgamma, norm.dbeta, arena);
      if (moves_weight) subtract(dense_weight, rates[0], dweight, weight.numel());
    } else {
      norm.gy = gy, norm.dz = moves_weight || below ? dz : nullptr;
      run_norm_relu_pool_grad(norm);
      if (below) layer->input_gradient(dz, gx);
      if (moves_weight) layer->update(dz, rates[0]);
    }
    if (update_gamma && rates[1] != T(0)) subtract(gamma, rates[1], norm.dgamma, c.outputs);
    if (update_beta && rates[2] != T(0)) subtract(beta, rates[2], norm.dbeta, c.outputs);
    return gx;
  }

  void finish() {
    if (layer) layer->finish();
    if (images && update_weight) weight.copy_(home());
  }

 private:
  static void subtract(T* parameter, T rate, const T* gradient, int64_t count) {
    for (int64_t i = 0; i < count; ++i) parameter[i] -= rate * gradient[i];
  }
  at::Tensor home() const { return at::from_blob(dense_weight, weight.sizes(), weight.options()); }
};

}  // namespace lk
