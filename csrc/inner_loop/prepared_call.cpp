// An adaptation that is called again and again: what stays the same is kept, so that a call of Python's is one of C++.
#include "inner_loop/prepared_call.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "inner_loop/inner_loop.h"

namespace lk {

namespace py = pybind11;

namespace {

class PreparedCall {
 public:
  PreparedCall(const py::list& parameters, std::vector<int64_t> updated, std::vector<int64_t> geometry,
               std::vector<double> eps)
      : parameters_(parameters), updated_(std::move(updated)), geometry_(std::move(geometry)), eps_(std::move(eps)) {
    for (py::handle p : parameters)
      if (!THPVariable_Check(p.ptr())) throw py::type_error("PreparedCall: no tensor: " + py::repr(p).cast<std::string>());
  }

  // xs [N, ...], ys [N] -> a list of the updated parameters' new values; None where something is not as it should be.
  py::object operator()(py::handle xs, py::handle ys, int64_t steps, const std::vector<double>& rates) const {
    std::vector<at::Tensor> found;
    if (!THPVariable_Check(xs.ptr()) || !THPVariable_Check(ys.ptr())) return py::none();
    {
      const at::Tensor &x = THPVariable_Unpack(xs.ptr()), &y = THPVariable_Unpack(ys.ptr());
      std::vector<at::Tensor> parameters;
      parameters.reserve(parameters_.size());
      for (py::handle p : parameters_) parameters.push_back(THPVariable_Unpack(p.ptr()));
      const py::gil_scoped_release others;
      if (!run(parameters, x, y, steps, rates, found)) return py::none();
    }
    py::list result;
    for (at::Tensor& t : found) result.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t))));
    return result;
  }

 private:
  bool run(const std::vector<at::Tensor>& parameters, const at::Tensor& x, const at::Tensor& y, int64_t steps,
           const std::vector<double>& rates, std::vector<at::Tensor>& found) const {
    // Past torch's dispatcher: nothing that is more than values in memory.
    const auto plain = [](const at::Tensor& t) { return !at::isTensorSubclassLike(t) && !t.is_neg(); };
    if (!std::all_of(parameters.begin(), parameters.end(), plain) || !plain(x) || !plain(y)) return false;
    try {
      auto [rows, updated, logits] =
          inner_loop(x.unsqueeze(0), y.unsqueeze(0), parameters, updated_, geometry_, eps_, steps, rates, std::nullopt);
      const double* values = rows.const_data_ptr<double>();
      found = std::move(updated);
      return std::all_of(values, values + rows.numel(), [](double value) { return std::isfinite(value); });
    } catch (const c10::Error&) {  // the caller's longer way says what is wrong
      return false;
    } catch (const std::bad_alloc&) {
      return false;
    } catch (const std::length_error&) {  // more steps than a vector has elements
      return false;
    }
  }

  py::list parameters_;  // Python's objects: torch swaps the tensors in them, where nobody else holds these
  std::vector<int64_t> updated_, geometry_;
  std::vector<double> eps_;
};

}  // namespace

void bind_prepared_call(py::module_& m) {
  py::class_<PreparedCall>(m, "PreparedCall", "inner_loop of one task with parameters, geometry and eps that stay.")
      .def(py::init<const py::list&, std::vector<int64_t>, std::vector<int64_t>, std::vector<double>>())
      .def("__call__", &PreparedCall::operator());
}

}  // namespace lk
