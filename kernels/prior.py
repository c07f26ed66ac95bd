"""Device code: what is read of a prior, the Gaussian that the KLs are to where it is not N(0, I).

With d = m - m', r = l - l' (l = logvar; ' is the prior's) and phi(r) = e^r - 1 - r,

    k = (d^2 e^-l' + phi(r)) / 2     dk/dm = d e^-l' = -dk/dm'     dk/dl = (e^r - 1) / 2
                                     dk/dl' = -(d^2 e^-l' + e^r - 1) / 2

(Kingma & Welling 2013, appendix B, for two Gaussians.) d and r come first: they lose nothing where
a posterior has collapsed onto its prior. d e^(-l'/2), the distance in standard deviations of the
prior, is what is squared: e^-l' alone may overflow.

Of a prior that all samples share, columns are read once for all rows of a tile.
"""

import triton
import triton.language as tl

from .gaussian import difference
from .tile import event_offsets, offsets


@triton.jit
def prior_tile(
    p_mean, p_scale, o_row, o_col, m_tile, inner,
    mean_row, mean_outer, mean_inner,
    scale_row, scale_outer, scale_inner,
    IDLE: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Its mean and scale for each element, of one for each sample."""
    o_mean = offsets(o_row, o_col, inner, mean_row, mean_outer, mean_inner, SPLIT, UNIT)
    o_scale = offsets(o_row, o_col, inner, scale_row, scale_outer, scale_inner, SPLIT, UNIT)
    b_mean = tl.load(p_mean + o_mean, m_tile, 0.0).to(DTYPE)
    b_scale = tl.load(p_scale + o_scale, m_tile, IDLE).to(DTYPE)
    return b_mean, b_scale


@triton.jit
def prior_columns(
    p_mean, p_scale, o_col, m_col, inner,
    mean_outer, mean_inner, scale_outer, scale_inner,
    IDLE: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Its mean and scale for each column, of one that all samples share; None of N(0, I)."""
    if p_mean is None:
        prior = None
    else:
        o_mean = event_offsets(o_col, inner, mean_outer, mean_inner, SPLIT, UNIT)
        o_scale = event_offsets(o_col, inner, scale_outer, scale_inner, SPLIT, UNIT)
        b_mean = tl.load(p_mean + o_mean, m_col, 0.0).to(DTYPE)
        prior = (b_mean, tl.load(p_scale + o_scale, m_col, IDLE).to(DTYPE))
    return prior


@triton.jit
def from_prior(
    mean_mu, mean_logvar, prior_mean, prior_scale, LOGVAR: tl.constexpr, ROOT: tl.constexpr
):
    """(d e^(-l'/2), r, what rounding has taken from r, e^(-l'/2)) of mean parameters."""
    root = ROOT(prior_scale)
    r, low = difference(mean_logvar, LOGVAR(prior_scale))
    return (mean_mu - prior_mean) * root, r, low, root
