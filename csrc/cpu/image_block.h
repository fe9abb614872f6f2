// The first block of a network: convolution, norm, ReLU and max-pool of images whose patches have few numbers (K = inputs
// kh kw), without a stored convolution output. Torch-free; the images of one task at a time.
#pragma once
#include <cstdint>

namespace lk {

constexpr int64_t kImageTaps = 9;  // taps that a reduction takes at a time: K is rounded up to whole ones

template <typename T>
struct ImageBlock {
  const T* x;  // [images, height, width, inputs], padded with zeros as the convolution needs them
  int64_t images, height, width, inputs;
  int64_t taps, padded_taps;        // K, and K rounded up
  const int64_t* offsets;           // [padded_taps] of a tap from a patch's first pixel, elements; 0 beyond K
  int64_t stride_y, stride_x;       // of the convolution, pixels
  int64_t pool, rows, columns;      // window (1 or 2), and the size of y
  int64_t out_rows, out_columns;    // of the convolution
  int64_t outputs, padded_outputs;  // channels of y, and these rounded up
  const T* weight;                  // [padded_taps, padded_outputs]
  const T* mean;                    // [padded_outputs]
  const T* scale;                   // [padded_outputs] gamma rstd
  const T* beta;                    // [padded_outputs]
  T* y;                             // [images, rows, columns, outputs]
  uint8_t* index;                   // as y: place of the maximum in its window, pool * pool where the ReLU is shut
  const T* gy;                      // as y
  double* partial;  // moments: [slabs, (K + 1)^2]; reduction: [slabs, padded_taps + 1, padded_outputs]
  int64_t slabs;    // of the images' rows, reduced apart
  int64_t kernel_y, kernel_x;
  bool dense;       // stride and dilation are 1
  double* scratch;  // moments of a dense convolution: [slabs, image_moments_scratch]
};

// The flat shifts between two taps in a row: from -(kernel_x inputs - 1) to that.
template <typename T>
int64_t image_shifts(const ImageBlock<T>& p) {
  return 2 * (p.kernel_x * p.inputs - 1) + 1;
}

// Doubles from one row of an image to the next in the scratch, with zeros for the shifts around it.
template <typename T>
int64_t image_row(const ImageBlock<T>& p) {
  return (p.width * p.inputs + image_shifts(p) + 31) / 16 * 16;
}

// Doubles that a slab needs: an image, and sums by distance of the rows (1 of them of the values themselves), shift and
// place in the row: over the rows that all taps share, and over each of the others.
template <typename T>
int64_t image_moments_scratch(const ImageBlock<T>& p) {
  return image_row(p) * (p.height + (p.kernel_y + 1) * (2 * p.kernel_y - 1) * image_shifts(p));
}

// Whether the moments are taken by the distance of two taps, image by image: each tap then reads some rows that all taps
// read, and others above or below these, but none that is both.
template <typename T>
bool by_distance(const ImageBlock<T>& p) {
  return p.dense && p.out_rows >= p.kernel_y - 1;
}

template <typename T>
struct ImageBlockKernels {
  void (*moments)(const ImageBlock<T>&, int64_t begin, int64_t end);  // slabs: x -> partial; of images, where dense
  void (*apply)(const ImageBlock<T>&, int64_t begin, int64_t end);    // (image, row of y): x -> y, index
  // slabs: gy, index, x -> partial: sums over the maxima of g patch, and below them of g
  void (*reduce)(const ImageBlock<T>&, int64_t begin, int64_t end);
  // slabs of the rows of windows: x -> the windows' maxima before the norm to y; partial [slabs, 2, padded_outputs]: sums
  // of the convolution's output and of its squares
  void (*survey)(const ImageBlock<T>&, int64_t begin, int64_t end);
  // (image, row of y): x, index -> y: the convolution minus mean plus beta at the maxima, 0 where the ReLU is shut
  void (*follow)(const ImageBlock<T>&, int64_t begin, int64_t end);
};

template <typename T>
const ImageBlockKernels<T>& image_block_kernels();

}  // namespace lk
