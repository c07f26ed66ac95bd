"""The cpu backend does not depend on the floating-point mode of the threads that it runs on.

Each test has threads of its own, which end with it: a team's threads inherit the mode of who
starts them, and the modes of other tests must stay as they are.
"""

import ctypes
import ctypes.util
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vaekl
from vaekl._plans import forget
from vaekl.testing import step

binding = pytest.importorskip("llvmlite.binding")
ir = pytest.importorskip("llvmlite.ir")
in_default_mode = pytest.importorskip("vaekl.kernels.cpu.mode").in_default_mode
cpu = pytest.importorskip("vaekl.backends.cpu")

BOUNDS = (-200.0, 1e-39)  # of clamp; the upper one is subnormal as float32
FE_UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}
SHAPES = [(40, 8), (9999, 6), (300, 3000)]  # one piece; several ranges; several tiles too
LOWEST = {torch.float64: -1415.0}  # exp(logvar / 2) is subnormal
TINY = {torch.float16: 2.0**-16, torch.float64: 2.0**-1030}  # a subnormal; others as bfloat16's


def flush():
    assert torch.set_flush_denormal(True)


def round_up():
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    assert library.fesetround(FE_UPWARD[platform.machine()]) == 0


def flushes(size=200_000):
    """Which of so many subnormals torch's own threads flush."""
    return (torch.full((size,), 1e-310, dtype=torch.float64) * 0.5).view(torch.int64) == 0


MODES = [
    pytest.param(
        flush,
        marks=pytest.mark.skipif(
            platform.machine() not in FE_UPWARD, reason="torch flushes on x86-64 and AArch64"
        ),
    ),
    pytest.param(
        round_up,
        marks=pytest.mark.skipif(
            platform.machine() not in FE_UPWARD or not ctypes.util.find_library("m"),
            reason="no fesetround whose constants are known",
        ),
    ),
]


def inputs(shape, dtype):
    """Near collapse, half of it subnormal; the last rows with a tiny std; tiny upstream."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tiny = TINY.get(dtype, 2.0**-130)
    scales = torch.tensor([tiny, tiny**0.5], dtype=torch.float64).repeat(shape[1] // 2)
    mu, logvar = ((draw(*shape) * scales).to(dtype) for _ in range(2))
    logvar[-5:] = LOWEST.get(dtype, -175.0)
    kl_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dkl = (draw(shape[0]) * tiny).to(kl_dtype)
    return mu, logvar, ((draw(*shape) * tiny).to(dtype), dkl, dkl[1])


def results(threads, mu, logvar, upstream):
    """All that the kernels give: forward, backward, statistics."""
    torch.set_num_threads(threads)
    found = [cpu.statistics(mu, logvar, 1)]
    for mean_over, reduction, clamp in (("batch", "none", None), ("all", "sum", BOUNDS)):
        options = {"mean_over": mean_over, "reduction": reduction, "clamp": clamp, "seed": 3}
        dz, dkl, of_mean = upstream
        dkl = dkl if reduction == "none" else dkl[0]
        found += step(
            lambda m, v, o=options: vaekl.reparameterize_kl(m, v, backend="cpu", **o),
            (mu, logvar), (dz, dkl, of_mean),
        ).tensors  # fmt: skip
    return found


def bits(tensors):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.detach().view(integers[t.element_size()]) for t in tensors]


def in_its_own_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_no_bit_depends_on_it(mode, dtype):
    def run(threads, tensors):
        mode()
        forget()  # what is planned is planned in this mode
        return results(threads, *tensors)

    for shape in SHAPES:
        tensors = inputs(shape, dtype)
        for threads in (1, 3):
            expected = in_its_own_thread(results, threads, *tensors)
            found = in_its_own_thread(run, threads, tensors)
            for i, (a, b) in enumerate(zip(bits(found), bits(expected))):
                assert torch.equal(a, b), (shape, threads, i, int((a != b).sum()))


def test_what_is_tested_is_flushed_elsewhere():
    """The inputs above are such that a kernel of plain torch gives something else."""

    def plain(mu, upstream):
        return mu * 1, mu * mu, upstream[0] * 1, upstream[1] * 1

    def run(*tensors):
        flush()
        return plain(*tensors)

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        mu, _, upstream = inputs(SHAPES[0], dtype)
        found = in_its_own_thread(run, mu, upstream)
        for a, b in zip(bits(found), bits(plain(mu, upstream))):
            assert not torch.equal(a, b)


def test_threads_are_left_in_their_mode():
    def run():
        flush()
        torch.set_num_threads(3)
        tensors = inputs(SHAPES[1], torch.float32)
        before = flushes().all().item()  # its team starts here, in the mode of this thread
        results(3, *tensors)
        return before, flushes().all().item(), flushes(8).all().item()

    assert in_its_own_thread(run) == (True, True, True)


def test_eager_keeps_subnormals_of_float16():
    """They are normal as float32, in which it computes; torch converts both ways exactly."""
    mu, logvar, _ = inputs((300, 64), torch.float16)
    logvar[-5:] = 0

    def run(switch):
        switch()
        m = mu.clone().requires_grad_()
        kl = vaekl.kl_loss(m, logvar, reduction="none", backend="eager")
        (dm,) = torch.autograd.grad(kl.sum(), m)
        return [kl, dm]

    found, expected = (in_its_own_thread(run, switch) for switch in (flush, lambda: None))
    for a, b in zip(bits(found), bits(expected)):
        assert torch.equal(a, b)
    assert found[1].count_nonzero() == mu.count_nonzero()


def code(machine):
    """LLVM's code of a task that does nothing but call its work."""
    module, nothing = ir.Module(), ir.FunctionType(ir.VoidType(), [])
    work = ir.Function(module, nothing, "work")
    builder = ir.IRBuilder(ir.Function(module, nothing, "task").append_basic_block())
    in_default_mode(builder, lambda builder: builder.call(work, []), machine)
    builder.ret_void()
    return str(module)


@pytest.mark.parametrize(
    ("machine", "read", "write"), [("x86_64", "stmxcsr", "ldmxcsr"), ("aarch64", "mrs", "msr")]
)
def test_machine_code(machine, read, write):
    """One look at the mode and, where it differs, a switch before the call and one after."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = f"{machine}-unknown-linux-gnu"
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip("this LLVM has no such target")
    module = binding.parse_assembly(code(machine))
    module.triple = triple
    lines = target.create_target_machine(opt=3).emit_assembly(module).splitlines()
    words = [line.split()[0] for line in lines if line.split()]
    kept = [word for word in words if word in {read, write, "callq", "bl"}]
    assert kept[0] == read
    assert (kept.count(read), kept.count(write)) == (1, 2)
    assert kept[kept.index(write) + 1] in {"callq", "bl"}


def test_code_of_other_machines():
    assert code("arm64") == code("aarch64")
    assert len(code("riscv64").splitlines()) < len(code("aarch64").splitlines())
    assert code("riscv64").count("call") == 1
