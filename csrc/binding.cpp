// The Python module lambda_kernels._C. The operators register themselves where they are defined.
#include <pybind11/pybind11.h>

#include <vector>

#include "arena.h"
#include "cpu/isa.h"
#include "inner_loop/prepared_call.h"

namespace {

using Found = std::vector<const void*>;

// A class and the number of its present version, which is another one after any change of it or of its bases.
void note_class(Found& found, PyTypeObject* type) {
  found.push_back(type);
  found.push_back(reinterpret_cast<const void*>(static_cast<uintptr_t>(type->tp_version_tag)));
}

pybind11::bytes as_bytes(const Found& found) {
  return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(void*)};
}

// The classes of `objects` and the addresses of all keys and values in `containers` (dicts and lists); with `names`,
// the addresses of the objects' attributes' names too, and the value of "training". Equal to an earlier result as long
// as nothing of that was replaced, given that what was in them is kept alive.
pybind11::bytes addresses(const pybind11::list& objects, const pybind11::list& containers, bool names) {
  static PyObject* training = PyUnicode_InternFromString("training");
  Found found;
  found.reserve(2048);
  for (pybind11::handle object : objects) note_class(found, Py_TYPE(object.ptr()));
  PyObject *key, *value;
  for (pybind11::handle container : containers) {
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
  for (pybind11::handle object : objects) {
    if (!names) break;
    const pybind11::object held = pybind11::getattr(object, "__dict__");
    found.push_back(nullptr);
    for (Py_ssize_t at = 0; PyDict_Next(held.ptr(), &at, &key, &value);) {
      found.push_back(key);
      if (key == training) found.push_back(value);
    }
  }
  return as_bytes(found);
}

// The versions of classes, and the addresses of the code of functions.
pybind11::bytes versions(const pybind11::list& classes, const pybind11::list& functions) {
  Found found;
  found.reserve(256);
  for (pybind11::handle type : classes) note_class(found, reinterpret_cast<PyTypeObject*>(type.ptr()));
  for (pybind11::handle function : functions) found.push_back(PyFunction_GetCode(function.ptr()));
  return as_bytes(found);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  lk::bind_prepared_call(m);
  m.def("addresses", &addresses, "Bytes that change when a class of `objects`, an entry or a name does.");
  m.def("versions", &versions, "Bytes that change when a class, or the code of a function, does.");
  m.def("kept_bytes", &lk::kept_bytes, "Bytes of scratch memory that wait for the next call.");
  m.def("isa", &lk::isa, "Instruction set of the CPU kernels: avx512, avx2 or generic (LAMBDA_KERNELS_ISA forces one).");
}
