"""Files that run something when they are read carelessly: they make the folder `marker`."""

import os
import pickle

import pyarrow as pa

RAYS = "ray.data.arrow_pickled_object"


class Payload:
    """Unpickled it makes the marker."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickled(marker, protocol=4):
    """The bytes of a pickle that makes the marker; torch wants protocol 2."""
    return pickle.dumps(Payload(marker), protocol=protocol)


class _Unpickling(pa.ExtensionScalar):
    def as_py(self, **_):
        return pickle.loads(self.value.as_py())


class Careless(pa.ExtensionType):
    """A type as Ray Data registers one: whoever looks at a value unpickles it."""

    def __init__(self):
        super().__init__(pa.large_binary(), "tests.careless")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()

    def __arrow_ext_scalar_class__(self):
        return _Unpickling


def planted_column(kind, marker, rows=1, *, nested=False):
    """A column of such values, of a registered type; or of structs that hold them."""
    values = kind.wrap_array(pa.array([pickled(marker)] * rows, pa.large_binary()))
    if not nested:
        return values
    fields = [pa.field("bytes", kind), pa.field("path", pa.string())]
    return pa.StructArray.from_arrays([values, pa.array(["x"] * rows)], fields=fields)


def planted(table, name, column):
    """The table with another column in the place of `name`."""
    return table.set_column(table.schema.get_field_index(name), name, column)


def described(marker):
    """A column of Ray's tensors, the description of whose type is a pickle."""
    told = {b"ARROW:extension:name": b"ray.data.arrow_tensor_v2"}
    told[b"ARROW:extension:metadata"] = pickled(marker)
    return pa.field("caption", pa.large_list(pa.int64()), metadata=told)
