// Python passes an array as the tuple (address, dtype code, shape, strides in elements), a bytearray of
// doubles, or None, and the place to run as (device, stream, threads): see noisyseg_fast/_arrays.py.
#pragma once
#include <pybind11/pybind11.h>

#include "noisyseg/array.h"

namespace pybind11::detail {

template <>
struct type_caster<noisyseg::Array> {
  PYBIND11_TYPE_CASTER(noisyseg::Array, const_name("tuple | None"));
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (PyByteArray_Check(source.ptr())) {
      value.data = PyByteArray_AS_STRING(source.ptr());
      value.dtype = noisyseg::DType::f64;
      value.rank = 1;
      value.shape[0] = PyByteArray_GET_SIZE(source.ptr()) / static_cast<Py_ssize_t>(sizeof(double));
      value.strides[0] = 1;
      return true;
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject* shape = PyTuple_GET_ITEM(source.ptr(), 2);
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 3);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides)) return false;
    const auto rank = PyTuple_GET_SIZE(shape);
    if (rank > noisyseg::Array::max_rank || PyTuple_GET_SIZE(strides) != rank) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<noisyseg::DType>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1)));
    value.rank = static_cast<int>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    return !PyErr_Occurred();
  }
};

template <>
struct type_caster<noisyseg::Exec> {
  PYBIND11_TYPE_CASTER(noisyseg::Exec, const_name("tuple"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 3) return false;
    value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
    value.stream = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1));
    value.threads = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 2)));
    return !PyErr_Occurred();
  }
};

}  // namespace pybind11::detail

namespace noisyseg {
namespace py = pybind11;
using release_gil = py::call_guard<py::gil_scoped_release>;
void bind_losses(py::module_& m);
void bind_task_losses(py::module_& m);
void bind_distance(py::module_& m);
void bind_surface(py::module_& m);
void bind_labels(py::module_& m);
void bind_norms(py::module_& m);
void bind_meta(py::module_& m);
void bind_noise(py::module_& m);
void bind_pixels(py::module_& m);
}  // namespace noisyseg
