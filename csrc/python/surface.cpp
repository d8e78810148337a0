#include "bind.h"

namespace noisyseg {
void bind_surface(py::module_&) {}
}  // namespace noisyseg
