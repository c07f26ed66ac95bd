"""CPU code: one function on all threads of an OpenMP team."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .mode import in_default_mode

_BYTES, _UINT = ir.IntType(8).as_pointer(), ir.IntType(32)
_TASK = ir.FunctionType(ir.VoidType(), [_BYTES])
#: void GOMP_parallel(void (*task)(void *), void *data, unsigned threads, unsigned flags)
_PARALLEL = ir.FunctionType(ir.VoidType(), [_TASK.as_pointer(), _BYTES, _UINT, _UINT])


def _new_task(module, name):
    task = ir.Function(module, _TASK, module.get_unique_name(name))
    task.linkage = "internal"
    return task


@intrinsic
def on_team(typingctx, parallel, threads, function, arguments):
    """function(*arguments) on each of `threads` threads, in the default floating-point mode.

    Returns when all have.

    `parallel`: the address of GOMP_parallel, which LLVM's and Intel's runtimes have as well as
    GCC's; 0: call it here, once. The function must not raise.
    """
    call = function.get_call_type(typingctx, arguments.types, {})
    compiled = function.dispatcher.overloads[call.args]

    def generate(context, builder, signature, values):
        parallel, threads, _, packed = values
        context.add_linking_libs([compiled.library])
        body = _new_task(builder.module, "body")
        body.attributes.add("noinline")
        inside = ir.IRBuilder(body.append_basic_block())
        data = inside.load(inside.bitcast(body.args[0], packed.type.as_pointer()))
        unpacked = cgutils.unpack_tuple(inside, data)
        context.call_internal_no_propagate(inside, compiled.fndesc, call, unpacked)
        inside.ret_void()

        task = _new_task(builder.module, "task")
        inside = ir.IRBuilder(task.append_basic_block())
        in_default_mode(inside, lambda inside: inside.call(body, task.args))
        inside.ret_void()

        data = builder.bitcast(cgutils.alloca_once_value(builder, packed), _BYTES)
        with builder.if_else(cgutils.is_null(builder, parallel)) as (alone, together):
            with alone:
                builder.call(task, [data])
            with together:
                start = builder.inttoptr(parallel, _PARALLEL.as_pointer())
                threads = builder.trunc(threads, _UINT)
                builder.call(start, [task, data, threads, _UINT(0)])
        return context.get_dummy_value()

    return types.void(parallel, threads, function, arguments), generate
