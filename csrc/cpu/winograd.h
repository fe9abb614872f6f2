// Convolutions of 3x3 pixels, stride 1, and their gradients by the minimal filtering algorithm F(2x2, 3x3)
// (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308): 16 products for 4 results where the plain sum takes 36.
// Torch-free.
#pragma once
#include <cstdint>

namespace lk {

constexpr int64_t kPoints = 16;  // of a tile of 4 x 4
constexpr int64_t kWinogradGap = 16;  // elements between the matrices of a group, which would share cache sets without

// Images are dense channels-last. Tiles are numbered over (image, row of tiles, column of tiles).
template <typename T>
struct Winograd {
  int64_t images, height, width, inputs;  // of x
  int64_t rows, columns, outputs;         // of y
  int64_t pad_y, pad_x;                   // zeros around x
  int64_t padded_inputs, padded_outputs;  // rounded up to whole vectors
  int64_t tile_rows, tile_columns, group;  // group: tiles that are transformed and multiplied together
  int64_t slabs;                           // of the groups, whose gradients are summed apart
  const T* x;                              // [images, height, width, inputs]
  const T* u;                              // [16, inputs, padded_outputs], of the weight
  T* y;                                    // [images, rows, columns, outputs]
  const T* gy;                             // as y
  T* pooled;  // in place of y: [images, rows / 2, columns / 2, outputs], its maxima in windows of 2 x 2
  double* partial;  // with pooled: [groups, 3, padded_outputs]: mean of y, sum of squares around it, number of pixels
  const T* bias;    // with pooled, in place of partial: [outputs], pooled is the ReLU of maximum + bias
  T* du;  // [slabs, 16, inputs, padded_outputs], of the weight's gradient
  bool more;  // gradient: to add to du, in place of setting it
};

// The same with derivatives along a direction: of x, u and gy (null for zeros) to those of y and du.
template <typename T>
struct WinogradTangent : Winograd<T> {
  const T *x_dot, *u_dot, *gy_dot;
  T *y_dot, *du_dot;  // du may be null
};

// A weight and its transform. turned: the weight of the input's gradient, inputs and outputs exchanged.
template <typename T>
struct WinogradWeight {
  int64_t outputs, inputs;
  T* weight;
  int64_t strides[4];  // of output, input, row, column, elements
  bool turned;
  int64_t padded;  // outputs (turned: inputs) rounded up to whole vectors
  T* u;  // [16, inputs, padded] (turned: [16, outputs, padded])
  const T* du;  // [slabs, 16, inputs, padded]
  int64_t slabs;
  T scale;
};

template <typename T>
struct WinogradKernels {
  void (*weights)(const WinogradWeight<T>&, int64_t begin, int64_t end);  // rows of u: weight -> u
  void (*forward)(const Winograd<T>&, int64_t begin, int64_t end, T* scratch);  // groups: x, u -> y, or pooled
  void (*gradient)(const Winograd<T>&, int64_t begin, int64_t end, T* scratch);  // slabs: x, gy -> du
  // inputs: weight += scale times the gradient that du holds
  void (*add_gradient)(const WinogradWeight<T>&, int64_t begin, int64_t end);
  // As forward and gradient, each with its derivative; twice the scratch.
  void (*forward_tangent)(const WinogradTangent<T>&, int64_t begin, int64_t end, T* scratch);
  void (*gradient_tangent)(const WinogradTangent<T>&, int64_t begin, int64_t end, T* scratch);
};

// Elements of scratch that a thread needs.
template <typename T>
int64_t winograd_scratch(const Winograd<T>& p) {
  return kPoints * (p.group * (p.padded_inputs + p.padded_outputs) + 2 * kWinogradGap);
}

template <typename T>
const WinogradKernels<T>& winograd_kernels();

}  // namespace lk
