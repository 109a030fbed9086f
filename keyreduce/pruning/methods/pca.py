"""PCA: a projection of each head's queries and keys onto the directions that hold most of the keys.

``P_h`` is the eigenvectors of the R largest eigenvalues of ``M_h = sum_t k_th k_th^T``, with k normalised as the
operator normalises it (the option ``include_queries`` adds the same sum over q). M is not centred, since a linear
projection cannot subtract a mean. Queries and keys become ``P^T q`` and ``P^T k``.

The operator uses only inner products of q and k, so a rotation (R = K) changes nothing if it commutes with everything
between projection and operator: it is exact with ``qk_activation: identity`` and convolution kernels that the channels
of a head share (delta_net_2). It does not commute with an activation, nor with a convolution whose kernels differ from
channel to channel. In those cases PCA is an approximation, in which the kernel of a new channel is the mean of the old
kernels, weighted by its squared coefficients. Nazari and Rusch, arXiv:2602.04852.
"""

from collections.abc import Mapping

from keyreduce.pruning.methods.method import LayerView, Method, Selection


def _moments(statistics, *, include_queries: bool):
    """Return M, ``[H, K, K]``, float64."""
    moment_HKK = statistics.unit_key_gram_HKK
    return moment_HKK + statistics.unit_query_gram_HKK if include_queries else moment_HKK


def _select(layer: LayerView, keep: int, generator, *, include_queries: bool) -> Selection:
    import torch

    value_HK, vector_HKK = torch.linalg.eigh(_moments(layer.statistics, include_queries=include_queries))
    projection_HKR = vector_HKK.flip(-1)[..., :keep]
    # The sign of an eigenvector is arbitrary; its largest coefficient is made positive.
    largest_H1R = projection_HKR.abs().argmax(dim=1, keepdim=True)
    projection_HKR = projection_HKR * projection_HKR.gather(1, largest_H1R).sign()
    value_HK = value_HK.flip(-1).clamp(min=0)
    kept_H = value_HK[:, :keep].sum(-1) / value_HK.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    return Selection(None, projection_HKR, {"variance_kept": kept_H.tolist()})


def _unfit(config: Mapping) -> str | None:
    from keyreduce.families import family_of

    family = family_of(config)
    norm = family.language(config).get("qk_norm", "l2")
    if family.per_channel:
        why = f"pca combines key channels, but in this architecture each {family.per_channel}"
    elif norm != "l2":
        why = f"pca rotates queries and keys, and qk_norm {norm!r} is not invariant to rotations"
    else:
        return None
    return f"{why}; take a method that selects channels, such as rrqr"


PCA = Method(
    name="pca",
    summary="projection onto the principal directions of the keys",
    citation="Nazari and Rusch, arXiv:2602.04852",
    select={"key": _select},
    needs_statistics=True,
    options={"include_queries": False},
    moments=_moments,
    unfit=_unfit,
)
