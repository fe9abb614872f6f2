#include "snapshot.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace lk {

namespace py = pybind11;

namespace {

using Found = std::vector<const void*>;

[[noreturn]] void refuse(const std::string& what, py::handle got) {
  throw py::type_error(what + ", got " + py::repr(got).cast<std::string>());
}

// A class and the number of its present version, which is another one after any change of it or of its bases.
void note_class(Found& found, PyTypeObject* type) {
  found.push_back(type);
  found.push_back(reinterpret_cast<const void*>(static_cast<uintptr_t>(type->tp_version_tag)));
}

py::bytes as_bytes(const Found& found) {
  return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(void*)};
}

// The classes of `objects` and the addresses of all keys and values in `containers` (dicts and lists); with `names`,
// the addresses of the objects' attributes' names too, and the value of "training". Equal to an earlier result as long
// as nothing of that was replaced, given that what was in them is kept alive.
py::bytes addresses(const py::list& objects, const py::list& containers, bool names) {
  for (py::handle container : containers)
    if (!PyList_Check(container.ptr()) && !PyDict_Check(container.ptr()))
      refuse("addresses: a container must be a list or a dict", container);
  static PyObject* training = PyUnicode_InternFromString("training");
  Found found;
  found.reserve(2048);
  for (py::handle object : objects) note_class(found, Py_TYPE(object.ptr()));
  PyObject *key, *value;
  for (py::handle container : containers) {
    found.push_back(nullptr);  // where one ends and the next begins
    if (PyList_Check(container.ptr())) {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container.ptr()); ++i) found.push_back(PyList_GET_ITEM(container.ptr(), i));
    } else {
      for (Py_ssize_t at = 0; PyDict_Next(container.ptr(), &at, &key, &value);) {
        found.push_back(key);
        found.push_back(value);
      }
    }
  }
  for (py::handle object : objects) {
    if (!names) break;
    const py::object held = py::getattr(object, "__dict__", py::none());
    if (!PyDict_Check(held.ptr())) refuse("addresses: an object's attributes must lie in a dict", held);
    found.push_back(nullptr);
    for (Py_ssize_t at = 0; PyDict_Next(held.ptr(), &at, &key, &value);) {
      found.push_back(key);
      if (key == training) found.push_back(value);
    }
  }
  return as_bytes(found);
}

// The versions of classes, and the addresses of the code of functions.
py::bytes versions(const py::list& classes, const py::list& functions) {
  Found found;
  found.reserve(256);
  for (py::handle type : classes) {
    if (!PyType_Check(type.ptr())) refuse("versions: a class was expected", type);
    note_class(found, reinterpret_cast<PyTypeObject*>(type.ptr()));
  }
  for (py::handle function : functions) {
    if (!PyFunction_Check(function.ptr())) refuse("versions: a function of Python's was expected", function);
    found.push_back(PyFunction_GetCode(function.ptr()));
  }
  return as_bytes(found);
}

// What each of some tensors is, without its values: dtype, device, whether it requires a gradient, sizes and strides.
py::bytes forms(const py::list& tensors) {
  std::vector<int64_t> found;
  found.reserve(512);
  for (py::handle tensor : tensors) {
    if (!THPVariable_Check(tensor.ptr())) refuse("forms: a tensor was expected", tensor);
    const at::Tensor& t = THPVariable_Unpack(tensor.ptr());
    found.insert(found.end(), {static_cast<int64_t>(t.scalar_type()), static_cast<int64_t>(t.device().type()),
                               t.device().index(), t.requires_grad(), static_cast<int64_t>(t.layout()), t.dim()});
    found.insert(found.end(), t.sizes().begin(), t.sizes().end());
    if (t.layout() == at::kStrided) found.insert(found.end(), t.strides().begin(), t.strides().end());
  }
  return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int64_t)};
}

const at::Tensor& tensor_of(py::handle held) {
  if (!THPVariable_Check(held.ptr())) refuse("same: a tensor was expected", held);
  return THPVariable_Unpack(held.ptr());
}

// Whether tensors hold the same bytes as others of their shapes. Torch's own counts of writes miss some: those of fused
// optimisers and of batch norms, and what goes through `.data` or `.numpy()`.
bool same(const py::list& tensors, const py::list& others) {
  if (tensors.size() != others.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor &a = tensor_of(tensors[i]), &b = tensor_of(others[i]);
    if (a.scalar_type() != b.scalar_type() || a.device() != b.device() || a.sizes() != b.sizes()) return false;
    const bool plain = a.layout() == at::kStrided && b.layout() == at::kStrided && a.is_cpu() &&
                       a.is_non_overlapping_and_dense() && a.strides() == b.strides() && !a.is_conj() && !a.is_neg();
    if (plain ? std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) != 0 : !at::equal(a, b)) return false;
  }
  return true;
}

}  // namespace

void bind_snapshot(py::module_& m) {
  m.def("addresses", &addresses, "Bytes that change when a class of `objects`, an entry or a name does.");
  m.def("forms", &forms, "Bytes that change when the dtype, device, shape or requires_grad of a tensor does.");
  m.def("same", &same, "Whether tensors hold the same bytes as others.");
  m.def("versions", &versions, "Bytes that change when a class, or the code of a function, does.");
}

}  // namespace lk
