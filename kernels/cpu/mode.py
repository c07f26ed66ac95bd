"""CPU code: the floating-point mode that kernels compute in, whatever that of their thread is.

Rounding and the flushing of subnormals are a register of each thread, which calls such as
torch.set_flush_denormal write to on some threads alone.
"""

from llvmlite import binding, ir

_WORD, _BYTES = ir.IntType(32), ir.IntType(8).as_pointer()
_FLAGS = 0x3F  # of MXCSR: what has happened, which is no mode
_DEFAULT = 0x1F80  # to nearest even, subnormals kept, nothing traps


def in_default_mode(builder, body, machine=None):
    """Emit body(builder) between a switch to IEEE 754's default mode and a switch back.

    The body should be a call that is not inlined: no arithmetic is bound to its side of a switch.
    Machines other than x86-64 and AArch64 stay in their mode; torch switches those two alone.
    """
    machine = machine or binding.get_process_triple().split("-")[0]
    if machine == "x86_64":
        _on_x86(builder, body)
    elif machine in ("aarch64", "arm64"):
        _on_arm(builder, body)
    else:
        body(builder)


def _on_x86(builder, body):
    def function(name):
        return builder.module.declare_intrinsic(name, fnty=ir.FunctionType(ir.VoidType(), [_BYTES]))

    found, wanted = builder.alloca(_WORD), builder.alloca(_WORD)
    builder.call(function("llvm.x86.sse.stmxcsr"), [builder.bitcast(found, _BYTES)])
    mode = builder.and_(builder.load(found), _WORD(0xFFFFFFFF & ~_FLAGS))
    differs = builder.icmp_unsigned("!=", mode, _WORD(_DEFAULT))
    with builder.if_then(differs, likely=False):  # a switch takes longer than to look
        builder.store(_WORD(_DEFAULT), wanted)
        builder.call(function("llvm.x86.sse.ldmxcsr"), [builder.bitcast(wanted, _BYTES)])
    body(builder)
    with builder.if_then(differs, likely=False):
        builder.call(function("llvm.x86.sse.ldmxcsr"), [builder.bitcast(found, _BYTES)])


def _on_arm(builder, body):
    if binding.llvm_version_info < (13,):  # it cannot write the register
        body(builder)
        return
    long = ir.IntType(64)
    read = builder.module.declare_intrinsic("llvm.aarch64.get.fpcr", fnty=ir.FunctionType(long, []))
    write = builder.module.declare_intrinsic(
        "llvm.aarch64.set.fpcr", fnty=ir.FunctionType(ir.VoidType(), [long])
    )
    found = builder.call(read, [])
    differs = builder.icmp_unsigned("!=", found, long(0))
    with builder.if_then(differs, likely=False):
        builder.call(write, [long(0)])
    body(builder)
    with builder.if_then(differs, likely=False):
        builder.call(write, [found])
