#include <omp.h>

#include "bind.h"
#include "cpu/isa.h"

namespace noisyseg {
namespace {

const char* isa_name() {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

py::dict build_info() {
  py::dict info;
  info["version"] = NOISYSEG_VERSION;
  info["compiler"] = NOISYSEG_COMPILER;
  info["instruction_sets"] = NOISYSEG_ISAS;
  info["instruction_set_in_use"] = isa_name();
  info["openmp_max_threads"] = omp_get_max_threads();
#ifdef NOISYSEG_WITH_CUDA
  info["cuda"] = NOISYSEG_CUDA_VERSION;
  info["cuda_architectures"] = NOISYSEG_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace
}  // namespace noisyseg

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "Compiled kernels of noisyseg_fast. Takes addresses, never tensors; see noisyseg_fast/_arrays.py.";
  m.def("build_info", &noisyseg::build_info);
  noisyseg::bind_losses(m);
  noisyseg::bind_task_losses(m);
  noisyseg::bind_distance(m);
  noisyseg::bind_surface(m);
}
