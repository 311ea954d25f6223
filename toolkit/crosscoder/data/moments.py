"""Running moments in float64, merged block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Moments:
    """Count, mean and sum of squared deviations of a stream, per trailing coordinate.

    Parameters
    ----------
    shape
        Shape of one observation.

    Notes
    -----
    Blocks are merged with the pairwise update of Chan, Golub & LeVeque (1983), doi:10.1080/00031305.1983.10483115,
    in float64 whatever the type of the data: no cancellation, as E[x^2] - E[x]^2 would have, and no dependence on how
    the stream is cut (beyond float64 rounding).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.n = 0
        self.mean: NDArray[np.float64] = np.zeros(shape)
        self.m2: NDArray[np.float64] = np.zeros(shape)

    def update(self, block: NDArray[np.floating]) -> None:
        """Merge ``block``, shape [n, *shape]."""
        if not len(block):
            return
        values = block.astype(np.float64, copy=False)
        mean = values.mean(axis=0)
        m2 = np.square(values - mean).sum(axis=0)
        total = self.n + len(values)
        shift = mean - self.mean
        self.mean = self.mean + shift * (len(values) / total)
        self.m2 = self.m2 + m2 + np.square(shift) * (self.n * len(values) / total)
        self.n = total


class ExplainedVariance:
    """Fraction of variance explained and reconstruction bias, per slot.

    Parameters
    ----------
    shape
        Shape of one observation; the last axis is summed over, leading axes are slots.

    Notes
    -----
    Explained: 1 - sum of squared residuals / sum of squares about the mean. The reference is the stream's own mean, not
    zero: predicting that mean scores exactly 0, and anything worse is negative. NaN where the data do not vary.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.moments, self._predicted, self._residuals = Moments(shape), Moments(shape), Moments(shape)

    def update(self, data: NDArray[np.floating], prediction: NDArray[np.floating]) -> None:
        """Merge a block of data and its prediction, both [n, *shape]."""
        self.moments.update(data)
        self._predicted.update(prediction)
        self._residuals.update(data.astype(np.float64) - prediction.astype(np.float64))

    def value(self) -> NDArray[np.float64]:
        """FVE of each slot (a 0-d array if there are no slot axes)."""
        return np.asarray(1.0 - _ratio(_squares(self._residuals), self.moments.m2.sum(axis=-1)))

    def share_of_squares(self) -> NDArray[np.float64]:
        """The same share of the sum of squares about zero: of a stream that hardly varies about its mean."""
        return np.asarray(1.0 - _ratio(_squares(self._residuals), _squares(self.moments)))

    def constant_share(self) -> NDArray[np.float64]:
        """Share of each slot's sum of squares about zero that its mean makes."""
        return np.asarray(1.0 - _ratio(self.moments.m2.sum(axis=-1), _squares(self.moments)))

    def bias(self) -> NDArray[np.float64]:
        """Relative reconstruction bias of each slot, about the means: below 1 where predictions are shrunk.

        The gamma that minimises ||prediction / gamma - data||^2 (arXiv:2404.16014, eq. 10), that is
        var(prediction) / cov(prediction, data).
        """
        predicted, residual = self._predicted.m2.sum(axis=-1), self._residuals.m2.sum(axis=-1)
        # cov(p, d) from var(p - d) = var(p) + var(d) - 2 cov(p, d)
        return _ratio(predicted, (predicted + self.moments.m2.sum(axis=-1) - residual) / 2)


def _squares(moments: Moments) -> NDArray[np.float64]:
    """Sum of squares about zero of each slot."""
    return np.asarray((moments.m2 + moments.n * np.square(moments.mean)).sum(axis=-1))


def _ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where the denominator is not positive."""
    ratio = np.full(np.shape(under), np.nan)
    np.divide(over, under, out=ratio, where=np.asarray(under) > 0)
    return np.asarray(ratio)
