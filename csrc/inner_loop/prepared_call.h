// The Python class PreparedCall.
#pragma once
#include <pybind11/pybind11.h>

namespace lk {

void bind_prepared_call(pybind11::module_& m);

}  // namespace lk
