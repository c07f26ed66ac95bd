"""An interpreter of PTX, the last text that Triton writes before NVIDIA's assembler.

It executes what a kernel was compiled to, thread by thread, on CPU tensors, and checks every
access: bounds, alignment, and that nothing is read which another thread may not yet have written.
Not modelled: time, what the assembler makes of it (SASS), memory weaker than happens-before.

Reading order: ``parse`` (text), ``floats`` and ``arithmetic`` (what an opcode computes),
``instructions`` (an instruction, bound to its registers), ``memory`` and ``races`` (what may be
accessed, and when), ``schedule`` (threads, branches, barriers, turns), ``counts`` (what a launch
did), ``launcher`` (behind Triton's launch). Only ``launcher`` imports torch and triton.
"""


class PtxError(Exception):
    """The kernel does something wrong, or something that is not known here."""
