#include "bind.h"

namespace noisyseg {
void bind_losses(py::module_&) {}
}  // namespace noisyseg
