"""Device code of vaekl, installed as ``vaekl.kernels``; it imports its compiler and itself only.

Reading order: ``gaussian`` (one element's terms), ``forms`` (what gives its logvar), ``tile``
(strides, and the order of columns), ``philox`` (noise), ``reduction`` (sums finished inside the
launch), then the kernels ``forward``, ``backward`` and ``statistics``. Their twins for CPUs,
compiled by numba, have the same names in ``cpu``, which says what else is there. The polynomials
of both are in ``coefficients``.

Grammar: ``p_`` pointers, ``o_`` offsets, ``m_`` masks, ``i_`` program ids, ``b_`` blocks of values.
"""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package vaekl.kernels; install vaekl (pip install -e .) and import "
        "vaekl.kernels (a top-level 'kernels' belongs to another distribution)"
    )
