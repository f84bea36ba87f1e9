// The Python face of cpu/features.h. Built without any instruction-set flag, so it loads anywhere. Of Python's own API: for one
// function without arguments, pybind11's headers would be all there is to compile.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/features.h"

namespace {

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* const answer = PyDict_New();
  if (answer == nullptr) return nullptr;
  for (const auto& set : regard::cpu::instruction_sets()) {
    PyObject* const lacks = Py_BuildValue("z", set.lacks);
    const bool stored = lacks != nullptr && PyDict_SetItemString(answer, set.name, lacks) == 0;
    Py_XDECREF(lacks);
    if (stored) continue;
    Py_DECREF(answer);
    return nullptr;
  }
  return answer;
}

int add_compiler(PyObject* module) { return PyModule_AddStringConstant(module, "compiler", __VERSION__); }

PyMethodDef methods[] = {{"instruction_sets", instruction_sets, METH_NOARGS,
                          "instruction_sets() -> dict[str, str | None]\n\n"
                          "{instruction set: None, or why it cannot run}, in order of preference, worst first."},
                         {}};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(add_compiler)},
#ifdef Py_mod_gil
                            {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                            {}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu_features", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu_features() { return PyModuleDef_Init(&definition); }
