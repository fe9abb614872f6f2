// Adapts a conv4 to a task and classifies its query images with libtorch and lambda_kernels/liblambda_kernels.so alone:
// the operators need no Python.
//
//   adapt liblambda_kernels.so task.pt 00011 5 0.1        (pattern, steps, rate)
//
// task.pt is a dictionary of tensors as torch.save writes it: the network's state_dict, and `support` [N, C, H, W],
// `labels` [N] and `query` [Q, C, H, W]. Prints the logits [Q, ways], a row per image.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

// Its schema and all that it takes: csrc/inner_loop/inner_loop.h.
using InnerLoop = std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor>(
    const at::Tensor& x, const at::Tensor& labels, at::TensorList parameters, at::IntArrayRef updated,
    at::IntArrayRef geometry, at::ArrayRef<double> eps, int64_t steps, at::ArrayRef<double> rates,
    const std::optional<at::Tensor>& query);

std::vector<char> bytes_of(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(path) + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

at::Tensor classify(const char* path, const std::string& pattern, int64_t steps, double rate) {
  const auto task = torch::jit::pickle_load(bytes_of(path)).toGenericDict();
  const auto tensor = [&](const std::string& name) { return task.at(name).toTensor(); };
  if (pattern.size() != 5) throw std::runtime_error("the pattern " + pattern + " has no bit for each of conv4's 5 layers");

  std::vector<at::Tensor> parameters;
  std::vector<int64_t> updated, geometry;
  const auto add = [&](const std::string& name, char bit) {
    parameters.push_back(tensor(name));
    updated.push_back(bit == '1');
  };
  for (size_t block = 0; block < 4; ++block) {
    const std::string path = "block" + std::to_string(block + 1);
    for (const char* part : {".conv.weight", ".norm.weight", ".norm.bias"}) add(path + part, pattern[block]);
    const int64_t one[] = {1, 1, 1, 1, 1, 1, 1, 2};  // stride, padding, dilation (vertical, horizontal); groups; pool
    geometry.insert(geometry.end(), std::begin(one), std::end(one));
  }
  for (const char* part : {"head.weight", "head.bias"}) add(part, pattern[4]);

  const auto inner_loop =
      c10::Dispatcher::singleton().findSchemaOrThrow("lambda_kernels::inner_loop", "").typed<InnerLoop>();
  const std::vector<double> eps(4, 1e-5);
  // One task, so 1 in front of images and labels. In return: the losses, the adapted parameters, the query's logits.
  const auto found = inner_loop.call(tensor("support").unsqueeze(0), tensor("labels").unsqueeze(0), parameters, updated,
                                     geometry, eps, steps, rate, tensor("query").unsqueeze(0));
  return std::get<2>(found)[0].contiguous();
}

}  // namespace

int main(int count, char** words) try {
  if (count != 6) throw std::runtime_error("adapt LIBRARY TASK PATTERN STEPS RATE");
  if (dlopen(words[1], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());  // registers the operators
  const at::Tensor logits = classify(words[2], words[3], std::atoll(words[4]), std::atof(words[5]));
  const float* value = logits.const_data_ptr<float>();
  for (int64_t image = 0; image < logits.size(0); ++image)
    for (int64_t way = 0; way < logits.size(1); ++way)
      std::printf("%.9g%c", *value++, way + 1 < logits.size(1) ? ' ' : '\n');  // 9 digits give a float back as it was
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
