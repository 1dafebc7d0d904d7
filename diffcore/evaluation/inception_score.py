"""The Inception score: how sure and how varied the classes of samples are."""

from torch import Tensor

__all__ = ["inception_score"]


def inception_score(logits: Tensor) -> float:
    """The exponential of the mean divergence between the classes of a sample and of all samples.

        exp( mean_x KL( p(y|x) || mean_x p(y|x) ) )

    It lies between 1 and the number of classes. Higher is better. It uses no reference, and
    depends on the number of samples: compare values at equal numbers only. One split is made, in
    float64. Salimans et al. 2016, arXiv:1606.03498.

    Args:
        logits: (N, K) logits of a classifier for K classes.

    Returns:
        The score.

    Raises:
        ValueError: the logits are not a matrix with a row.
    """
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (samples, classes)")
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    divergence = (p * (log_p - p.mean(0).log())).nan_to_num(0).sum(1)  # 0 ln 0 = 0
    return float(divergence.mean().exp())
