"""Strong rank-revealing QR, read off a Gram matrix: which columns of a matrix span it best.

Gu and Eisenstat, "Efficient algorithms for computing a strong rank-revealing QR factorization", SIAM J. Sci. Comput.
17(4), 1996. For ``A Pi = Q [[R11, R12], [0, R22]]`` with k kept columns S and d - k dropped columns T, their lemma 3.1
says that exchanging the i-th kept with the j-th dropped column multiplies ``|det R11|`` by

    rho_ij = sqrt((R11^-1 R12)_ij^2 + (gamma_j / omega_i)^2)

with gamma_j the norm of column j of R22 and 1 / omega_i the norm of row i of R11^-1. Columns are exchanged while the
largest rho is above f. Then, by their theorem 3.2, with ``q = sqrt(1 + f^2 k (d - k))`` and singular values descending,

    sigma_i(A) / q <= sigma_i(R11) <= sigma_i(A)    and    sigma_j(R22) <= q sigma_{k+j}(A).

Only ``G = A^T A`` is needed: R11^-1 R12 is ``W = G_SS^-1 G_ST``, omega_i^-2 is the diagonal of ``P = G_SS^-1``, and
gamma_j^2 the diagonal of the Schur complement ``C = G_TT - G_TS W``. All three live in one symmetric tableau

    M = [[-P, W], [W^T, C]]    with    rho_ij^2 = M_ij^2 - M_ii M_jj,

and an exchange is one principal pivot on the rows and columns i and j: an update of rank two, O(d^2). M itself is
``keep`` principal pivots of one row and column each away from G: the sweep operator (Goodnight, "A tutorial on the
SWEEP operator", The American Statistician 33(3), 1979), whose pivots are those of Cholesky. The whole computation is a
sequence of small updates, each far below the size at which BLAS starts threads, which would cost more than the work.

Arithmetic. Squaring A loses half of the digits: anything below about 1e-6 of a column's norm is lost in G. Therefore
the diagonal of G is increased by a factor of 1 + 10 d eps, with a floor far below all other entries for columns of
zeros. This is the Gram matrix of A with a tiny diagonal matrix below it. It is positive definite, so that rho is finite
and exchanges end even if A is rank deficient; and no step depends on the columns' scales.

Shape legend: K channels (columns of A), R kept channels, T dropped channels, S the R kept and then the T dropped.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg.blas import dgemm  # pyright: ignore[reportAttributeAccessIssue]

from keyreduce.errors import KeyreduceError

# An exchange must gain more than rounding errors do, or f = 1 would exchange equal columns for ever.
_LEAST_GAIN = 1e-8
# The norm assumed for a column of zeros, relative to the largest. Its fourth power does not underflow.
_ZERO_NORM = 1e-60


@dataclass(frozen=True)
class StrongRRQR:
    """The kept channels, and how well they reveal the rank.

    Attributes:
        kept_R: int64, ascending.
        rho: the largest rho_ij at the end, of A with the tiny diagonal matrix below it; 0.0 if every channel is kept.
        swaps: how many exchanges were made after the pivoted Cholesky factorisation.
        smallest_kept: the smallest singular value of R11, in A's units; 0.0 if a column of zeros had to be kept.
        largest_dropped: the largest singular value of R22; 0.0 if nothing is dropped. Both are resolved down to about
            1e-6 of the columns' norms, which is their value if A is singular.
    """

    kept_R: np.ndarray
    rho: float
    swaps: int
    smallest_kept: float
    largest_dropped: float


def strong_rrqr(gram_KK: np.ndarray, keep: int, *, f: float = 1.5) -> StrongRRQR:
    """Choose ``keep`` columns of A, given ``A^T A``, such that no exchange grows their volume by more than f.

    Starts from pivoted Cholesky and makes the exchange with the largest rho while that is above f. |det R11| grows with
    every exchange, so the loop ends; where rounding errors exceed the growth, it ends with a ``rho`` above f. Ties go
    to the lower channel, and of identical columns (zeros included) the lowest are kept.

    Args:
        gram_KK: the Gram matrix of A, whose rows are tokens and whose columns are channels: symmetric, finite.
        keep: the number of columns to keep, from 1 to K.
        f: the bound on rho, at least 1. Closer to 1 is tighter and takes more exchanges.

    Raises:
        KeyreduceError: f is below 1.
    """
    if not f >= 1:
        raise KeyreduceError(f"`f` is {f}; it is at least 1")
    # BLAS would update a copy of any other dtype.
    gram_KK = np.asarray(gram_KK, dtype=np.float64)
    channels = len(gram_KK)
    if not 1 <= keep <= channels:
        raise ValueError(f"keep is {keep} of {channels} channels")
    bound = max(f, 1 + _LEAST_GAIN)
    norm_K = np.sqrt(np.maximum(gram_KK.diagonal(), 0))
    scale = norm_K.max() or 1.0
    tableau, swaps = _reveal(gram_KK / scale**2, keep, bound)
    kept_R, dropped_T = np.split(tableau.channel_S, [keep])
    inverse_RR, schur_TT = -tableau.matrix_SS[:keep, :keep], tableau.matrix_SS[keep:, keep:]
    return StrongRRQR(
        kept_R=kept_R,
        rho=tableau.rho,
        swaps=swaps,
        smallest_kept=float(scale / np.linalg.eigvalsh(inverse_RR)[-1] ** 0.5) if norm_K[kept_R].all() else 0.0,
        largest_dropped=float(scale * np.linalg.eigvalsh(schur_TT)[-1] ** 0.5) if norm_K[dropped_T].any() else 0.0,
    )


class Tableau(NamedTuple):
    """The tableau of a choice of columns.

    Attributes:
        matrix_SS: M of the module's docstring.
        channel_S: the channel of each row of M, int64: the kept ones, then the dropped ones, each ascending.
        keep: the number of kept channels.
        log_volume: log |det R11|.
    """

    matrix_SS: np.ndarray
    channel_S: np.ndarray
    keep: int
    log_volume: float

    @property
    def rho(self) -> float:
        """The largest rho_ij, 0.0 if nothing is dropped."""
        return float(np.sqrt(_rho_squared(self.matrix_SS, self.keep).max(initial=0)))


def factorise(gram_KK: np.ndarray, keep: int, kept_R: np.ndarray | None = None) -> Tableau:
    """Return the tableau of a choice of columns, by default that of pivoted Cholesky, where ties go to the lowest.

    LAPACK's dpstrf reorders channels as it pivots, so that ties would no longer go to the lower one. Raises LinAlgError
    if the Gram matrix is not safely positive definite.
    """
    matrix_KK, log_pivots = gram_KK.copy(), 0.0
    # A view of the swept matrix: negative for kept channels, the remaining squared norm for the others.
    diagonal_K = matrix_KK.diagonal()
    least_K = np.finfo(float).eps * gram_KK.diagonal()
    for step in range(keep):
        channel = diagonal_K.argmax() if kept_R is None else kept_R[step]
        if not diagonal_K[channel] > least_K[channel]:
            raise np.linalg.LinAlgError("a pivot is lost in rounding")
        log_pivots += math.log(diagonal_K[channel])
        _sweep(matrix_KK, int(channel))
    is_kept_K = diagonal_K < 0
    if not (is_kept_K | (diagonal_K > least_K)).all() or is_kept_K.sum() != keep:
        raise np.linalg.LinAlgError("the Schur complement is lost in rounding")
    channel_S = np.concatenate([np.flatnonzero(is_kept_K), np.flatnonzero(~is_kept_K)])
    return Tableau(matrix_KK[np.ix_(channel_S, channel_S)], channel_S, keep, log_pivots / 2)


def exchange(matrix_SS: np.ndarray, out: int, into: int) -> None:
    """Exchange the kept row ``out`` of M with the dropped row ``into``, in place.

    With ``B`` the 2 x 2 block of both, ``U`` their two rows, turned to ``V = [U_into; -U_out]``, and ``N = B / rho^2``:
    ``M + V^T N V`` for all others, ``-N V`` for the two rows and columns themselves, ``N`` where they cross. This is
    the principal pivot on ``B``, whose determinant is ``-rho^2``: exchanges with a large rho are also stable.
    """
    pair = [out, into]
    rows_2S = matrix_SS[pair]
    block_22 = rows_2S[:, pair]
    block_22 /= block_22[0, 1] ** 2 - block_22[0, 0] * block_22[1, 1]
    turned_2S = np.stack([rows_2S[1], -rows_2S[0]])
    pivoted_2S = block_22 @ turned_2S
    _add_product(matrix_SS, 1.0, turned_2S, pivoted_2S)
    pivoted_2S *= -1
    pivoted_2S[:, pair] = block_22
    matrix_SS[pair] = pivoted_2S
    matrix_SS[:, pair] = pivoted_2S.T


def _sweep(matrix_SS: np.ndarray, row: int) -> None:
    """Move one more row of M to the kept ones, in place."""
    row_1S = matrix_SS[row : row + 1].copy()
    pivot = row_1S[0, row]
    swept_1S = row_1S / pivot
    _add_product(matrix_SS, -1.0, row_1S, swept_1S)
    swept_1S[0, row] = -1 / pivot
    matrix_SS[row] = matrix_SS[:, row] = swept_1S


def _add_product(matrix_SS: np.ndarray, sign: float, left_NS: np.ndarray, right_NS: np.ndarray) -> None:
    """Add ``sign left^T right``, which is symmetric, in place."""
    # M equals its transpose, which is contiguous in BLAS's column-major order.
    dgemm(sign, left_NS.T, right_NS.T, 1.0, matrix_SS.T, trans_b=1, overwrite_c=1)


def _rho_squared(matrix_SS: np.ndarray, keep: int) -> np.ndarray:
    diagonal_S = matrix_SS.diagonal()
    weights_RT = matrix_SS[:keep, keep:]
    return weights_RT * weights_RT - np.multiply.outer(diagonal_S[:keep], diagonal_S[keep:])


def _reveal(gram_KK: np.ndarray, keep: int, bound: float) -> tuple[Tableau, int]:
    """Return the final tableau, recomputed, and the number of exchanges; the largest diagonal entry must be 1."""
    twins = _twins(gram_KK)
    diagonal_K = np.maximum(gram_KK.diagonal(), _ZERO_NORM**2)
    definite_KK = gram_KK.copy()
    ridge = 10 * len(gram_KK) * np.finfo(float).eps
    while True:
        np.fill_diagonal(definite_KK, diagonal_K * (1 + ridge))
        try:
            tableau, swaps = factorise(definite_KK, keep), 0
            if twins:
                tableau = factorise(definite_KK, keep, _lowest_of(twins, tableau.channel_S[:keep]))
            while tableau.rho > bound:
                kept_R, tried = _exchange_until(tableau, bound)
                fresh = factorise(definite_KK, keep, _lowest_of(twins, kept_R))
                if fresh.log_volume <= tableau.log_volume:
                    break
                tableau, swaps = fresh, swaps + tried
            return tableau, swaps
        except np.linalg.LinAlgError:
            if ridge > 1:
                raise
            # The Gram matrix was computed in a lower precision than float64.
            ridge *= 10


def _exchange_until(tableau: Tableau, bound: float) -> tuple[np.ndarray, int]:
    """Exchange until rho is within the bound, at most K times, since rounding errors add up.

    Returns the kept channels, and how many exchanges were made.
    """
    matrix_SS, channel_S, keep = tableau.matrix_SS.copy(), tableau.channel_S.copy(), tableau.keep
    for tried in range(len(channel_S)):
        rho_squared_RT = _rho_squared(matrix_SS, keep)
        largest = rho_squared_RT.max()
        if not largest > bound * bound:
            return channel_S[:keep], tried
        # In a tie, the lowest channel is kept and the highest one dropped.
        out_N, into_N = np.nonzero(rho_squared_RT == largest)
        into_N += keep
        chosen = np.lexsort((-channel_S[out_N], channel_S[into_N]))[0]
        pair = [out_N[chosen], into_N[chosen]]
        exchange(matrix_SS, int(pair[0]), int(pair[1]))
        channel_S[pair] = channel_S[pair[::-1]]
    return channel_S[:keep], len(channel_S)


def _twins(gram_KK: np.ndarray) -> list[np.ndarray]:
    """Return the groups of identical channels, each ascending."""
    _, inverse_K, counts = np.unique(gram_KK.diagonal(), return_inverse=True, return_counts=True)
    channels_of = defaultdict(list)
    for channel in np.flatnonzero(counts[inverse_K] > 1):
        # Adding 0 turns -0.0 into 0.0, whose bytes differ.
        channels_of[(gram_KK[channel] + 0.0).tobytes()].append(channel)
    return [np.array(same) for same in channels_of.values() if len(same) > 1]


def _lowest_of(twins: list[np.ndarray], kept_R: np.ndarray) -> np.ndarray:
    """Return the kept channels, where of identical ones the lowest are taken."""
    for same in twins:
        others = np.setdiff1d(kept_R, same)
        kept_R = np.concatenate([others, same[: len(kept_R) - len(others)]])
    return kept_R
