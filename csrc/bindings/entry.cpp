// The function that Python calls to load one instruction set's module: REGARD_ENTRY, PyInit_ and the module's name.

struct _object;  // PyObject: all that is needed of Python here, whose headers take longer than the rest

extern "C" {
_object* PyInit__cpu();  // module.cpp's
[[gnu::visibility("default")]] _object* REGARD_ENTRY() { return PyInit__cpu(); }
}
