#include "checks.h"

#include <sstream>
#include <string>
#include <string_view>

namespace lk {

void Operands::refuse(const char* what, const at::Tensor& t, at::IntArrayRef sizes, int64_t place,
                      at::ScalarType dtype) const {
  std::ostringstream wanted, of;
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    wanted << (axis == 0 ? "[" : ", ");
    if (sizes[axis] >= 0)
      wanted << sizes[axis];
    else if (sizes[axis] == kSome || tasks_ < 1)
      wanted << "at least 1";
    else
      wanted << (tasks_ == 1 ? "1" : "1 or ") << (tasks_ == 1 ? "" : std::to_string(tasks_));
  }
  if (place >= 0) of << " of layer " << place;
  TORCH_CHECK(t.defined(), name_, ": ", what, of.str(), " is not given");
  TORCH_CHECK(false, name_, ": ", what, of.str(), " must be ", wanted.str(), "] in ", dtype, " on the CPU, got ", t.sizes(),
              " in ", t.scalar_type(), " on ", t.device(), t.layout() == at::kStrided ? "" : ", sparse");
}

Convolution Operands::convolution(at::IntArrayRef x_, at::IntArrayRef weight_, const int64_t* geometry, int64_t groups,
                                  int64_t pool) const {
  const at::IntArrayRef x = x_.slice(x_.size() - 4), weight = weight_.slice(weight_.size() - 4);
  const at::IntArrayRef numbers(geometry, 6);
  const auto within = [](at::IntArrayRef values, int64_t least) {
    return std::all_of(values.begin(), values.end(), [&](int64_t v) { return v >= least && v <= kMostSide; });
  };
  TORCH_CHECK(within(numbers.slice(0, 2), 1) && within(numbers.slice(2, 2), 0) && within(numbers.slice(4), 1) &&
                  within({groups, pool}, 1),
              name_, ": the numbers ", numbers, ", ", groups, " groups and pool ", pool,
              " must be strides from 1 on, paddings from 0 on, dilations, groups and a pool from 1 on, up to ", kMostSide);
  TORCH_CHECK(within(x, 1) && within(weight, 1) && x[1] % groups == 0 && weight[1] == x[1] / groups &&
                  weight[0] % groups == 0,
              name_, ": a weight ", weight, " in ", groups, " groups does not fit images ", x, ", sizes from 1 up to ",
              kMostSide);
  for (int axis : {0, 1}) {
    const int64_t side = x[2 + axis] + 2 * geometry[2 + axis], reach = geometry[4 + axis] * (weight[2 + axis] - 1) + 1;
    TORCH_CHECK(side >= reach && (side - reach) / geometry[axis] + 1 >= pool, name_, ": images ", x, " with the numbers ",
                numbers, " are too small for a weight ", weight, " and pool ", pool);
  }
  Convolution c = Convolution::of(x[0], x[1], x[2], x[3], weight[0], {weight[2], weight[3]}, geometry, groups);
  // A side of 1 is not dilated: oneDNN faults on it in channels-last memory (spec.py).
  for (int axis : {0, 1})
    if (c.kernel[axis] == 1) c.dilation[axis] = 1;
  const auto values = [this](std::initializer_list<int64_t> sizes) {
    double all = double(tasks_);
    for (int64_t size : sizes) all *= double(size);
    return all;
  };
  const double most =
      std::max({values({c.images, c.height + 2 * c.padding[0], c.width + 2 * c.padding[1], c.inputs}),
                values({c.images, c.rows, c.columns, c.outputs}), values({c.inputs, c.kernel[0], c.kernel[1], c.outputs})});
  TORCH_CHECK(most <= double(kMostValues), name_, ": images ", x, " with a weight ", weight, " and the numbers ", numbers,
              " need ", most, " values at a time, more than ", kMostValues);
  return c;
}

ChainSizes Operands::chain(const at::Tensor& x, at::ArrayRef<at::Tensor> parameters, at::IntArrayRef geometry,
                           at::ArrayRef<double> eps) const {
  const int64_t blocks = int64_t(eps.size()), all = kPerBlock * blocks, count = int64_t(parameters.size());
  const bool whole = count == all + 2;
  TORCH_CHECK(whole || (count == all && blocks > 0), name_, ": ", blocks, " blocks need ", all + 2, " parameters, got ",
              count);
  check_count("geometry", geometry.size(), kGeometry * blocks);
  blocks > 0 ? check("x", x, {tasks_, kSome, kSome, kSome, kSome}) : check("x", x, {tasks_, kSome, kSome});
  ChainSizes sizes;
  sizes.blocks.reserve(blocks), sizes.pools.reserve(blocks);
  sizes.channels = x.size(2), sizes.height = blocks > 0 ? x.size(3) : 1, sizes.width = blocks > 0 ? x.size(4) : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t *const g = geometry.data() + b * kGeometry, groups = g[6], pool = g[7];
    const at::Tensor* const at = &parameters[b * kPerBlock];
    TORCH_CHECK(pool == 1 || pool == 2, name_, ": the pool of block ", b, " must be 1 or 2, got ", pool);
    check("the weight", at[0], {kOwn, kSome, kSome, kSome, kSome}, b);
    const Convolution c =
        convolution({x.size(1), sizes.channels, sizes.height, sizes.width}, at[0].sizes(), g, groups, pool);
    check("gamma", at[1], {kOwn, c.outputs}, b), check("beta", at[2], {kOwn, c.outputs}, b);
    sizes.blocks.push_back(c), sizes.pools.push_back(pool);
    sizes.channels = c.outputs, sizes.height = c.rows / pool, sizes.width = c.columns / pool;
  }
  if (!whole) return sizes;
  check("the weight", parameters[all], {kOwn, kSome, sizes.features()}, blocks);
  sizes.ways = parameters[all].size(1);
  check("the bias", parameters[all + 1], {kOwn, sizes.ways}, blocks);
  return sizes;
}

at::Tensor Operands::labels(const at::Tensor& given, std::initializer_list<int64_t> sizes, int64_t ways) const {
  check("labels", given, sizes, -1, at::kLong);
  const at::Tensor dense = given.contiguous();
  const int64_t* const label = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i)
    TORCH_CHECK(label[i] >= 0 && label[i] < ways, name_, ": label ", label[i], " is not one of 0 to ", ways - 1);
  return dense;
}

void Operands::check_rates(int64_t steps, at::IntArrayRef updated, size_t rates, bool each) const {
  const int64_t moving = std::count_if(updated.begin(), updated.end(), [](int64_t flag) { return flag != 0; });
  TORCH_CHECK(steps >= 0 && steps <= kMostSide, name_, ": steps must be from 0 to ", kMostSide, ", got ", steps);
  TORCH_CHECK((!each && rates == 1) || int64_t(rates) == steps * moving, name_, ": ", steps, " steps of ", moving,
              " updated parameters need ", each ? "" : "1 rate or ", steps * moving, ", got ", rates);
}

void out_of_memory(const std::exception& why) {
  const auto* const error = dynamic_cast<const c10::Error*>(&why);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "lambda_kernels: not enough memory (",
                   error == nullptr ? why.what() : error->what_without_backtrace(),
                   "): take fewer tasks or images at a time");
}

bool lacks_memory(const c10::Error& why) {
  return std::string_view(why.what_without_backtrace()).find("can't allocate memory") != std::string_view::npos;
}

}  // namespace lk
