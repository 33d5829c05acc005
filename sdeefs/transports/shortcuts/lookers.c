/* Who wants the attributes of what it lists: core/lookers.py in C, on the same table. */
#include "shortcuts.h"

static uint64_t looker(const struct call *call, uint32_t mode)
{
	return (uint64_t)call->pid << 1 | S_ISDIR(mode);
}

static Py_ssize_t place_in(Shortcuts *self, uint64_t key)
{
	return (Py_ssize_t)(key % (uint64_t)PyList_GET_SIZE(self->lookers));
}

int wants_attributes(Shortcuts *self, const struct call *call, uint32_t mode)
{
	uint64_t key = looker(call, mode);

	return PyLong_AsUnsignedLongLongMask(PyList_GET_ITEM(self->lookers, place_in(self, key))) == key;
}

/* Filesystem.lookup()'s note. */
void note_lookup(Shortcuts *self, PyObject *directory, const struct call *call, uint32_t mode)
{
	uint64_t key = looker(call, mode);
	PyObject *number;

	if (slot_int(directory, shape.lister) != (long)call->pid)
		return;
	number = PyLong_FromUnsignedLongLong(key);
	if (number)
		(void)PyList_SetItem(self->lookers, place_in(self, key), number);
	else
		PyErr_Clear(); /* it stays unknown */
}
