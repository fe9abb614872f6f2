// The instruction set that the kernels run in. Torch-free.
#pragma once

namespace lk {

// The fastest one of this machine, or the one that LAMBDA_KERNELS_ISA names: "avx512", "avx2", "generic".
[[gnu::visibility("default")]] const char* isa();

}  // namespace lk
