// Whether what a plan rests on is still so.
#pragma once

#include <pybind11/pybind11.h>

namespace eman {

// Adds the class Watch to the extension, and use_torch, which must be called before one is made.
void bind_watch(pybind11::module_& m);

}  // namespace eman
