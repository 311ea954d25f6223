"""How far an edit moves the residual stream: the norm of the joint vector that a set's features write, per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ModelCodes:
    """One model's features on a sample of tokens, and what a unit of each writes.

    Attributes
    ----------
    codes
        [token, feature] activations f_k, sparse by column.
    directions
        [feature, channel] what a unit of each adds to this model's residual, raw units.
    """

    codes: sparse.csc_array
    directions: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TokenCodes:
    """Both unedited models' features on the same tokens, those that a trial edits.

    Attributes
    ----------
    base, rl
        The two models.
    difference
        Mean over tokens of ||a_rl - a_base||, raw units: what a full patch of the site changes.
    """

    base: ModelCodes
    rl: ModelCodes
    difference: float


@dataclass(frozen=True, eq=False)
class EditNorm:
    """Mean over tokens of ||sum_k c_k d_k||, raw units, for any set of features of one kind of edit.

    Attributes
    ----------
    parts
        Changes c [token, feature] and directions d of one model or, where features are copied from another, of both.

    Examples
    --------
    >>> codes = sparse.csc_array([[1.0, 0.0], [3.0, 4.0]])
    >>> size = EditNorm((ModelCodes(codes, np.eye(2, dtype=np.float32)),))
    >>> size.of((0,)), size.of((0, 1))
    (2.0, 3.0)
    """

    parts: tuple[ModelCodes, ...]

    def of(self, features: Sequence[int] | NDArray[np.int64]) -> float:
        """Norm of the edit of one set."""
        return float(self.of_each([np.asarray(features)])[0])

    def of_each(self, sets: Sequence[Sequence[int] | NDArray[np.int64]] | NDArray[np.int64]) -> Floats:
        """[set] norms of the edits of several sets.

        Notes
        -----
        A token's squared norm is c' G c with G the products of the directions: nothing of the size of the residual is
        made for the thousands of sets that matching looks at. Where there are more directions than channels the
        residual is the smaller one, and is made.
        """
        members = [np.asarray(one, dtype=np.int64) for one in sets]
        widest = self.parts[0].directions.shape[1] // len(self.parts)
        small = [one for one in members if len(one) <= widest]
        known = np.unique(np.concatenate(small)) if small else np.empty(0, dtype=np.int64)
        changes = np.concatenate([part.codes[:, known].toarray().T for part in self.parts]).astype(np.float64)
        directions = np.concatenate([part.directions[known] for part in self.parts]).astype(np.float64)
        products = directions @ directions.T

        def of_small(one: NDArray[np.int64]) -> float:
            places = np.searchsorted(known, one)
            rows = np.concatenate([places + n * len(known) for n in range(len(self.parts))])
            c = changes[rows]
            squared = np.einsum("kt,kt->t", products[np.ix_(rows, rows)] @ c, c)
            return float(np.sqrt(np.maximum(squared, 0.0)).mean())

        def of_large(one: NDArray[np.int64]) -> float:
            written = sum(part.codes[:, one] @ part.directions[one].astype(np.float64) for part in self.parts)
            return float(np.linalg.norm(written, axis=1).mean())

        return np.array([of_small(one) if len(one) <= widest else of_large(one) for one in members])


def scaled(model: ModelCodes, factor: float, levels: Floats | None = None) -> EditNorm:
    """Norms of edits f' - f = factor * f, or of factor * level where [feature] levels are declared."""
    codes = model.codes if levels is None else sparse.csc_array(levels[None])
    return EditNorm((ModelCodes(factor * codes, model.directions),))


def copied(codes: TokenCodes) -> EditNorm:
    """Norms of lifting base's features to the RL model's, each with that model's directions; of lowering, the same."""
    return EditNorm((codes.rl, ModelCodes(-codes.base.codes, codes.base.directions)))
