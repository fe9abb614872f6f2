// The CPU's kernels without torch and Python, beside plain loops in double: for processors that the tests do not run on,
// and for sanitizers.
// Prints the largest error of each result, relative to its largest value; status 1 where one is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <vector>

#include "arena.h"
#include "convolution.h"
#include "cpu/isa.h"
#include "image_block.h"
#include "norm_relu_pool.h"
#include "product.h"
#include "winograd.h"

namespace {

using namespace lk;
using Doubles = std::vector<double>;

bool failed = false;
uint64_t state = 1;

double draw() {  // in (-1, 1), from a linear congruential generator
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) / double(uint64_t(1) << 52) - 1.0;
}

template <typename T>
std::vector<T> drawn(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = T(draw());
  return values;
}

template <typename T>
void check(const char* what, const T* got, const Doubles& want) {
  double error = 0.0, largest = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double distance = std::abs(double(got[i]) - want[i]);
    error = std::max(error, std::isnan(distance) ? INFINITY : distance), largest = std::max(largest, std::abs(want[i]));
  }
  error /= largest;
  const bool good = error < 1000.0 * double(std::numeric_limits<T>::epsilon());
  failed = failed || !good;
  std::printf("%-28s float%d %.1e%s\n", what, int(8 * sizeof(T)), error, good ? "" : " WRONG");
}

template <typename T>
void products() {
  const int64_t rows = 37, columns = 23, depth = 41, row = up(columns, kLanes);
  const auto a = drawn<T>(rows * depth), b = drawn<T>(depth * row);
  auto c = drawn<T>(rows * row);
  Doubles want(c.begin(), c.end());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < row; ++j)
      for (int64_t k = 0; k < depth; ++k) want[i * row + j] += 0.5 * double(a[i * depth + k]) * double(b[k * row + j]);
  multiply<T>({a.data(), depth, 1, b.data(), row, c.data(), row, rows, columns, depth, T(0.5), true});
  for (int64_t i = 0; i < rows; ++i)  // what pads a row is anyone's
    for (int64_t j = columns; j < row; ++j) c[i * row + j] = T(want[i * row + j]);
  check("product", c.data(), want);
}

// Each (image, row, column, output, input, kernel row, kernel column) of a convolution, with its places in x, weight and y.
void over(const Convolution& c, const std::function<void(int64_t, int64_t, int64_t)>& f) {
  for (int64_t n = 0; n < c.images; ++n)
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t s = 0; s < c.columns; ++s)
        for (int64_t o = 0; o < c.outputs; ++o)
          for (int64_t k = 0; k < c.inputs; ++k)
            for (int64_t i = 0; i < c.kernel[0]; ++i)
              for (int64_t j = 0; j < c.kernel[1]; ++j) {
                const int64_t h = r * c.stride[0] + i * c.dilation[0] - c.padding[0];
                const int64_t w = s * c.stride[1] + j * c.dilation[1] - c.padding[1];
                if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
                f(((n * c.height + h) * c.width + w) * c.inputs + k,
                  ((o * c.inputs + k) * c.kernel[0] + i) * c.kernel[1] + j, ((n * c.rows + r) * c.columns + s) * c.outputs + o);
              }
}

template <typename T>
void convolutions() {
  const int64_t geometry[] = {1, 1, 1, 0, 1, 1};
  const Convolution c = Convolution::of(3, 18, 7, 9, 21, {3, 3}, geometry);
  const int64_t ins = c.images * c.height * c.width * c.inputs, outs = c.pixels() * c.outputs;
  const auto x = drawn<T>(ins), gy = drawn<T>(outs);
  auto weight = drawn<T>(c.outputs * c.inputs * 9);
  Doubles y(outs), gx(ins), gw(weight.begin(), weight.end());
  over(c, [&](int64_t from, int64_t w, int64_t to) {
    y[to] += double(x[from]) * double(weight[w]);
    gx[from] += double(gy[to]) * double(weight[w]);
    gw[w] += double(gy[to]) * double(x[from]);
  });
  Arena arena;
  const int64_t strides[] = {c.inputs * 9, 9, 3, 1};
  const WinogradConvolution<T> filter(c, weight.data(), strides);
  std::vector<T> got(outs), back(ins);
  filter.forward(x.data(), got.data(), arena);
  check("winograd", got.data(), y);
  filter.input_gradient(gy.data(), back.data(), arena);
  check("winograd, of x", back.data(), gx);
  filter.add_weight_gradient(x.data(), gy.data(), T(1), arena);
  check("winograd, of the weight", weight.data(), gw);
}

struct Block {
  Doubles y, dz, dgamma, dbeta, mean, rstd;
};

// z [n, h, w, c] of one task: norm, ReLU, max-pool by `pool`, and the way back of gy
template <typename T>
Block block(const T* z, const std::vector<T>& gamma, const std::vector<T>& beta, const T* gy, int64_t n, int64_t h, int64_t w,
            int64_t pool, double eps) {
  const int64_t c = int64_t(gamma.size()), rows = h / pool, columns = w / pool, pixels = n * h * w;
  Block b{Doubles(n * rows * columns * c), Doubles(pixels * c), Doubles(c), Doubles(c), Doubles(c), Doubles(c)};
  for (int64_t k = 0; k < c; ++k) {
    double variance = 0.0;
    for (int64_t p = 0; p < pixels; ++p) b.mean[k] += double(z[p * c + k]) / double(pixels);
    for (int64_t p = 0; p < pixels; ++p) variance += std::pow(double(z[p * c + k]) - b.mean[k], 2) / double(pixels);
    b.rstd[k] = 1.0 / std::sqrt(variance + eps);
    const auto unit = [&](int64_t p) { return (double(z[p * c + k]) - b.mean[k]) * b.rstd[k]; };
    Doubles g(pixels);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = 0; s < columns; ++s) {
          double best = -INFINITY;
          int64_t at = 0;
          for (int64_t u = 0; u < pool * pool; ++u) {
            const int64_t p = (i * h + r * pool + u / pool) * w + s * pool + u % pool;
            const double value = double(gamma[k]) * unit(p) + double(beta[k]);
            if (value > best) best = value, at = p;
          }
          const int64_t to = ((i * rows + r) * columns + s) * c + k;
          b.y[to] = std::max(best, 0.0);
          if (best > 0.0) g[at] = double(gy[to]), b.dbeta[k] += g[at], b.dgamma[k] += g[at] * unit(at);
        }
    for (int64_t p = 0; p < pixels; ++p)
      b.dz[p * c + k] =
          double(gamma[k]) * b.rstd[k] * (g[p] - (b.dbeta[k] + unit(p) * b.dgamma[k]) / double(pixels));
  }
  return b;
}

template <typename T>
void norms(int64_t pool) {
  NormReluPool<T> p{};
  p.tasks = 1, p.images = 3, p.channels = 19, p.height = 7, p.width = 6, p.pool = pool, p.eps = 1e-5;
  set_slabs(p);
  const int64_t ins = p.images * p.height * p.width * p.channels;
  const int64_t outs = p.images * (p.height / pool) * (p.width / pool) * p.channels;
  const auto z = drawn<T>(ins), gamma = drawn<T>(p.channels), beta = drawn<T>(p.channels), gy = drawn<T>(outs);
  std::vector<T> y(outs), mean(p.channels), rstd(p.channels), dgamma(p.channels), dbeta(p.channels), dz(ins);
  std::vector<uint8_t> index(outs);
  Doubles partial(p.images * p.slabs * 2 * p.channels);
  p.z = z.data(), p.gamma = gamma.data(), p.beta = beta.data(), p.gy = gy.data(), p.y = y.data(), p.index = index.data();
  p.mean = mean.data(), p.rstd = rstd.data(), p.dgamma = dgamma.data(), p.dbeta = dbeta.data(), p.dz = dz.data();
  p.partial = partial.data();
  const Block want = block(z.data(), gamma, beta, gy.data(), p.images, p.height, p.width, pool, p.eps);
  run_norm_relu_pool(p);
  check("norm, mean", mean.data(), want.mean), check("norm, rstd", rstd.data(), want.rstd);
  check(pool == 1 ? "norm, ReLU" : "norm, ReLU, pool", y.data(), want.y);
  run_norm_relu_pool_grad(p);
  check("norm, of gamma", dgamma.data(), want.dgamma), check("norm, of beta", dbeta.data(), want.dbeta);
  check("norm, of z", dz.data(), want.dz);
}

template <typename T>
void first_blocks(int64_t stride) {
  const int64_t geometry[] = {stride, stride, 1, 1, 1, 1}, pool = 2;
  const double eps = 1e-5;
  const Convolution c = Convolution::of(4, 3, 11, 10, 21, {3, 3}, geometry);
  const int64_t ins = c.images * c.height * c.width * c.inputs, taps = 9 * c.inputs;
  const int64_t outs = c.images * (c.rows / pool) * (c.columns / pool) * c.outputs;
  auto x = drawn<T>(ins);
  for (T& value : x) value += T(3);
  const auto weight = drawn<T>(c.outputs * taps), gamma = drawn<T>(c.outputs), beta = drawn<T>(c.outputs), gy = drawn<T>(outs);
  Doubles z(c.pixels() * c.outputs);
  over(c, [&](int64_t from, int64_t w, int64_t to) { z[to] += double(x[from]) * double(weight[w]); });
  const Doubles g(gamma.begin(), gamma.end()), b(beta.begin(), beta.end()), out(gy.begin(), gy.end());
  const Block want = block(z.data(), g, b, out.data(), c.images, c.rows, c.columns, pool, eps);
  Doubles dweight(weight.size());
  over(c, [&](int64_t from, int64_t w, int64_t to) { dweight[w] += double(x[from]) * want.dz[to]; });

  Arena arena;
  const int64_t strides[] = {c.height * c.width * c.inputs, 1, c.width * c.inputs, c.inputs};
  const ImageConvolution<T> images(c, pool, x.data(), strides, arena);
  Doubles moments((taps + 1) * (taps + 1));
  images.moments(moments.data(), arena);
  const Patches patches(taps, moments.data());
  std::vector<T> y(outs), mean(c.outputs), rstd(c.outputs), dw(weight.size()), dgamma(c.outputs), dbeta(c.outputs);
  std::vector<uint8_t> index(outs);
  images.block(weight.data(), gamma.data(), beta.data(), patches, eps, y.data(), index.data(), mean.data(), rstd.data(), arena);
  check("first block, mean", mean.data(), want.mean), check("first block, rstd", rstd.data(), want.rstd);
  check("first block", y.data(), want.y);
  images.block_grad(gy.data(), weight.data(), gamma.data(), index.data(), rstd.data(), patches, dw.data(), dgamma.data(),
                    dbeta.data(), arena);
  check("first block, of the weight", dw.data(), dweight);
  check("first block, of gamma", dgamma.data(), want.dgamma), check("first block, of beta", dbeta.data(), want.dbeta);
}

// Pieces of one arena keep their own values; large ones are of large pages.
template <typename T>
void scratch() {
  Arena arena;
  std::vector<T*> pieces;
  Doubles got, want;
  const int64_t sizes[] = {1, 1000, (5 << 20) / int64_t(sizeof(T)) + 3, 77};
  for (int64_t size : sizes) pieces.push_back(arena.take<T>(size)), std::fill_n(pieces.back(), size, T(pieces.size()));
  for (std::size_t i = 0; i < pieces.size(); ++i)
    for (int64_t at : {int64_t(0), sizes[i] - 1}) got.push_back(double(pieces[i][at])), want.push_back(double(i + 1));
  const std::vector<T> values(got.begin(), got.end());
  check("scratch memory", values.data(), want);
}

template <typename T>
void all() {
  scratch<T>(), products<T>(), convolutions<T>();
  for (int64_t pool : {1, 2}) norms<T>(pool);
  for (int64_t stride : {1, 2}) first_blocks<T>(stride);
}

}  // namespace

int main() {
  std::printf("kernels: %s\n", lk::isa());
  all<float>(), all<double>();
  return failed ? 1 : 0;
}
