// What arena.cpp takes of torch's.
#pragma once
#include <new>

#define TORCH_CHECK_WITH(error, condition, ...) \
  do {                                          \
    if (!(condition)) throw std::bad_alloc();   \
  } while (false)
