"""CPU code: memory by its address, and the blocks of a worker."""

from numba import carray, types
from numba.extending import intrinsic, register_jitable

from .numeric import JIT

BLOCK = 2048  # elements of a block, each row of it rounded up to whole groups of noise


@intrinsic
def _pointer(typingctx, address, like):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(like).as_pointer())

    return types.CPointer(like)(types.int64, like), generate


# These two are jitable: numba compiles what is njit anew for each literal that it is called with.
@register_jitable(**JIT)
def array_at(address, like, n):
    """n elements of what `like` is an example of."""
    return carray(_pointer(address, like), n)


@intrinsic
def read(typingctx, address, index, like):
    """Element `index` of the array at `address` of what `like` is an example of."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(like).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return like(types.int64, types.int64, like), generate


@intrinsic
def write(typingctx, address, index, value):
    """Store value as element `index` of the array at `address`."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(value).as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), generate


@intrinsic
def fetch_add(typingctx, address, index):
    """Add 1 to an int64 that workers share; what it was before."""

    def generate(context, builder, signature, args):
        integer = context.get_value_type(types.int64)
        pointer = builder.gep(builder.inttoptr(args[0], integer.as_pointer()), [args[1]])
        return builder.atomic_rmw("add", pointer, integer(1), "acq_rel")

    return types.int64(types.int64, types.int64), generate


@register_jitable(**JIT)
def block(work, i, n):
    """The first n elements of the i-th block of a worker's memory."""
    return array_at(work.ctypes.data + i * BLOCK * work.itemsize, work.dtype.type(0), n)
