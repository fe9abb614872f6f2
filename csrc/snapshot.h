// What a network is at one time, as bytes that are compared: Python's dictionaries, classes and tensors looked at in C++.
#pragma once
#include <pybind11/pybind11.h>

namespace lk {

void bind_snapshot(pybind11::module_& m);

}  // namespace lk
