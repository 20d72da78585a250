// The module _C. Importing it loads the CPU kernels, which register themselves (cpu/*.cpp).

#include <pybind11/pybind11.h>

namespace {

namespace py = pybind11;

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = SPARSEGRAD_VERSION;
  info["torch"] = SPARSEGRAD_TORCH;
  info["compiler"] = compiler();
  info["flags"] = SPARSEGRAD_FLAGS;
  info["cuda_architectures"] = SPARSEGRAD_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled CPU kernels of sparsegrad_kernels.";
  m.def("build_info", &build_info, "How this library was built, and for which processors.");
}
