// Checks that everything that a plan depends on is unchanged.
#pragma once

#include <pybind11/pybind11.h>

namespace eman {

// Adds the class Guards to the extension, with use_torch, which must be called before a Guards is made, and
// bump_versions.
void bind_guards(pybind11::module_& m);

}  // namespace eman
