#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Asks that fresh memory come in huge pages: a hint, to be given before the memory is touched.
void use_huge_pages(std::uintptr_t address, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t page = 4096, start = (address + page - 1) / page * page;
  if (bytes > 2 * page)
    madvise(reinterpret_cast<void*>(start), (address + bytes - start) / page * page, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace
}  // namespace noisyseg

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "Compiled kernels of noisyseg_fast. Takes addresses, never tensors; see noisyseg_fast/_arrays.py.";
  m.def("build_info", &noisyseg::build_info);
  m.def("use_huge_pages", &noisyseg::use_huge_pages);
  noisyseg::bind_losses(m);
  noisyseg::bind_task_losses(m);
  noisyseg::bind_distance(m);
  noisyseg::bind_surface(m);
  noisyseg::bind_labels(m);
  noisyseg::bind_norms(m);
  noisyseg::bind_meta(m);
  noisyseg::bind_noise(m);
  noisyseg::bind_pixels(m);
}
