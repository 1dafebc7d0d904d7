"""The share of samples that a classifier, trained on real data, assigns to their labels."""

from torch import Tensor

from diffcore.io.extras import import_extra

__all__ = ["LabelClassifier"]


class LabelClassifier:
    """A support vector machine (radial basis functions, C = 10) trained on real samples.

    Args:
        x: (N, *shape) real samples.
        labels: (N,) their class labels.
    """

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        svm = import_extra("sklearn.svm", "The accuracy of digit labels", extra="evaluate")
        self.machine = svm.SVC(C=10.0).fit(x.flatten(1).numpy(), labels.numpy())

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of samples that are assigned to their labels. Higher is better.

        Args:
            x: (N, *shape) samples.
            labels: (N,) class labels that the samples were conditioned on.

        Returns:
            A number from 0 to 1.
        """
        return float(self.machine.score(x.flatten(1).numpy(), labels.numpy()))
