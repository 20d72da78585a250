// The module _C. Importing it loads the CPU kernels, which register themselves (cpu/*.cpp).

#include <pybind11/pybind11.h>

#include "common.h"

namespace {

namespace py = pybind11;

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

// What `simd` in common.h was compiled for, and what it calls on this processor.
py::tuple simd_compiled() {
#if defined(SPARSEGRAD_AVX2)
  return py::make_tuple("baseline", "avx2", "avx512");
#else
  return py::make_tuple("baseline");
#endif
}

py::object simd_used() {
#if defined(SPARSEGRAD_AVX2)
  return simd_compiled()[sparsegrad::simd_level()];
#else
  return simd_compiled()[0];
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = SPARSEGRAD_VERSION;
  info["torch"] = SPARSEGRAD_TORCH;
  info["compiler"] = compiler();
  info["flags"] = SPARSEGRAD_FLAGS;
  info["simd_compiled"] = simd_compiled();
  info["simd_used"] = simd_used();
  info["cuda_architectures"] = SPARSEGRAD_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled CPU kernels of sparsegrad_kernels.";
  m.def("build_info", &build_info, "How this library was built, and for which processors.");
}
