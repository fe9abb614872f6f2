// The Python module lambda_kernels._C. The operators register themselves where they are defined.
#include <pybind11/pybind11.h>

#include <vector>

#include "arena.h"
#include "cpu/isa.h"
#include "inner_loop/prepared_call.h"

namespace {

// The classes of `objects`, and the addresses of all keys and values in `containers` (dicts and lists): equal to an
// earlier result as long as nothing in them was replaced, given that what was in them is kept alive.
pybind11::bytes addresses(const pybind11::list& objects, const pybind11::list& containers) {
  std::vector<const void*> found;
  found.reserve(2048);
  for (pybind11::handle object : objects) found.push_back(Py_TYPE(object.ptr()));
  for (pybind11::handle container : containers) {
    found.push_back(nullptr);  // where one ends and the next begins
    if (PyList_Check(container.ptr())) {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container.ptr()); ++i) found.push_back(PyList_GET_ITEM(container.ptr(), i));
    } else {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(container.ptr(), &at, &key, &value);) {
        found.push_back(key);
        found.push_back(value);
      }
    }
  }
  return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(void*)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  lk::bind_prepared_call(m);
  m.def("addresses", &addresses, "Bytes that change when a class of `objects` or an entry of the dicts or lists does.");
  m.def("kept_bytes", &lk::kept_bytes, "Bytes of scratch memory that wait for the next call.");
  m.def("isa", &lk::isa, "Instruction set of the CPU kernels: avx512, avx2 or generic (LAMBDA_KERNELS_ISA forces one).");
}
