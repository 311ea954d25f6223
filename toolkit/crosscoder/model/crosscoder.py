"""The crosscoder: one sparse code for several views of the same token.

Shapes: V views of d_m channels, D = sum of d_m, F features. Normalised units are raw units times one scalar per view.
A joint activation is flat, [batch, D]: the views' channels side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.study import Readout
from rlgen_stats.stores import write_json
from rlgen_stats.stores.crosscoder_weights import SPEC, WEIGHTS
from rlgen_stats.stores.digests import file_sha256
from rlgen_stats.toolkit.crosscoder.data.paired import ViewMoments
from rlgen_stats.toolkit.crosscoder.model.files import write_tensors
from rlgen_stats.toolkit.crosscoder.model.readout import FeatureReadout, Gate, Sparsity
from rlgen_stats.toolkit.crosscoder.model.sparse import SparseCode, matmul
from rlgen_stats.toolkit.crosscoder.model.views import JointViews

FORMAT_VERSION: Final = 2
"""2 (2026-11): one matrix for all views, whose widths may differ. 1: [view, channel, feature]; still read."""

INITIAL_NORM: Final = 0.4
"""Initial decoder norm of a feature over all views: below 1, so that norms grow towards the data instead of shrinking,
and large enough that the first reconstructions are not negligible."""


class Crosscoder(nn.Module, JointViews):
    """One code f for all views: f = act(sum_m W_m a_m + b), a_hat_m = D_m f + c_m.

    Parameters
    ----------
    views
        Model ids, one per slot.
    width
        Channels d_m: one number, or one per view.
    n_features
        Dictionary size F.
    sparsity
        What act does after a ReLU. ``"l1"``: nothing. ``"batchtopk"``, ``"dfc"``: f_k stays active where its
        contribution f_k sum_m ||d_mk|| exceeds ``threshold``. ``"jumprelu"``: the same with one threshold per feature.
        ``"topk"``: a token's ``k`` largest contributions stay active.
    k
        Mean number of active features per token in training (not used by l1).
    exclusive
        View -> number of features that only this view may use (dfc); the shared ones come first, then these, view by
        view. Their encoder and decoder weights of all other views are zero.
    readout
        Declared readout of one model's features.
    name
        Name in the study.
    seed
        Seed of the initial weights.

    Attributes
    ----------
    scale : Tensor [view]
        normalised = raw * scale; the mean norm of a normalised token is sqrt(d_m).
    encoder_matrix, decoder_matrix : Parameter [D, feature], [feature, D]
        Normalised units.
    encoder_bias, decoder_offset : Parameter [feature], [D]
        Normalised units.
    means : Tensor [D]
        Raw means.
    encoder, decoder, decoder_bias, mean : Tensor
        The same by view, sharing memory, where all widths are equal: [view, channel, feature],
        [view, feature, channel], [view, channel], [view, channel].
    threshold : Tensor [] or [feature], float64
        Inference threshold(s); NaN until learned, unused for l1 and topk.
    fit_weight, fit_bias : Tensor [channel, feature], [feature], or None
        Readout ``fit``, once :func:`fit_readout` has fitted it; raw activations of one model to pre-activations.
    shared_decoder : Tensor [feature, channel], or None
        Raw units: decodes one model's features, whichever model, once :meth:`share_decoder` has fixed it.
    ranks_activations : bool
        Whether ``topk`` keeps a token's k largest f_k, as in SAEs trained elsewhere, instead of contributions.
    facts : dict
        Where the weights come from (seed, steps, data); saved with them.
    weights_sha256 : str
        Hash of the saved weights, empty before saving.
    folder : Path or None
        Where it was saved or loaded.

    References
    ----------
    Lindsey et al. (2024), Sparse crosscoders, https://transformer-circuits.pub/2024/crosscoders/; Bussmann et al.
    (2024), arXiv:2412.06410 (BatchTopK); Minder et al. (2025), arXiv:2504.02922 (BatchTopK crosscoders);
    Rajamanoharan et al. (2024), arXiv:2407.14435 (JumpReLU).
    """

    encoder_matrix: nn.Parameter
    decoder_matrix: nn.Parameter
    encoder_bias: nn.Parameter
    decoder_offset: nn.Parameter
    scale: Tensor
    means: Tensor
    threshold: Tensor
    fit_weight: Tensor | None
    fit_bias: Tensor | None
    shared_decoder: Tensor | None

    def __init__(
        self,
        views: Sequence[str],
        *,
        width: int | Sequence[int],
        n_features: int,
        sparsity: Sparsity,
        k: int,
        exclusive: Mapping[str, int] | None = None,
        readout: Readout = "swap",
        name: str = "crosscoder",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(views)) != len(views) or not views:
            raise InputError(f"the views of a crosscoder must be distinct model ids, got {list(views)}.")
        self.views, self.name = tuple(views), name
        self.widths = (int(width),) * len(views) if isinstance(width, int) else tuple(int(d) for d in width)
        if len(self.widths) != len(self.views):
            raise InputError(f"give one width, or one per view: got {list(self.widths)} for {len(self.views)} views.")
        self.n_features, self.k = int(n_features), int(k)
        self.sparsity: Sparsity = sparsity
        self.default_readout: Readout = readout
        self.ranks_activations = False
        self.facts: dict[str, Any] = {}
        self.weights_sha256 = ""
        self.folder: Path | None = None
        self.exclusive = self._partition(exclusive or {})
        self._initialise(seed)
        self.register_buffer("scale", torch.ones(len(self.views)))
        self.register_buffer("means", torch.zeros(sum(self.widths)))
        shape = (self.n_features,) if sparsity == "jumprelu" else ()
        self.register_buffer("threshold", torch.full(shape, math.nan, dtype=torch.float64))
        self.register_buffer("fit_weight", None)
        self.register_buffer("fit_bias", None)
        self.register_buffer("shared_decoder", None)

    def _partition(self, exclusive: Mapping[str, int]) -> dict[str, slice]:
        """View -> its exclusive features, after the shared ones."""
        if bool(exclusive) != (self.sparsity == "dfc"):
            raise InputError(f"sparsity 'dfc', and it alone, declares exclusive features; got {dict(exclusive)}.")
        n_exclusive = {self.views[self.view_index(view)]: int(n) for view, n in exclusive.items()}
        start = self.n_features - sum(n_exclusive.values())
        if start < 0 or min(n_exclusive.values(), default=0) < 0:
            raise InputError(f"{dict(exclusive)} exclusive features do not fit in {self.n_features}.")
        parts = {}
        for view in self.views:
            n = n_exclusive.get(view, 0)
            if n:
                parts[view] = slice(start, start + n)
            start += n
        return parts

    def _initialise(self, seed: int) -> None:
        """Decoder rows with the same random direction in every view, the encoder their transpose, biases zero.

        Views agree at the start, so that a difference between them is learned, not drawn. Narrower views take the
        first channels of a direction.
        """
        n_views, slots = len(self.views), self.slots()
        draws = torch.randn(self.n_features, max(self.widths), generator=torch.Generator().manual_seed(seed))
        rows = torch.empty(self.n_features, sum(self.widths))
        for channels in slots:
            directions = draws[:, : channels.stop - channels.start]
            rows[:, channels] = directions * (INITIAL_NORM / math.sqrt(n_views) / directions.norm(dim=1, keepdim=True))
        for view, features in self.exclusive.items():
            for other, channels in zip(self.views, slots, strict=True):
                if other != view:
                    rows[features, channels] = 0.0
        self.decoder_matrix = nn.Parameter(rows)
        self.encoder_matrix = nn.Parameter(rows.T.contiguous())
        self.encoder_bias = nn.Parameter(torch.zeros(self.n_features))
        self.decoder_offset = nn.Parameter(torch.zeros(sum(self.widths)))

    # -- weights by view -----------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Tensor:
        """[view, channel, feature]."""
        return self.encoder_matrix.view(len(self.views), self.width, self.n_features)

    @property
    def decoder(self) -> Tensor:
        """[view, feature, channel]."""
        return self.decoder_matrix.view(self.n_features, len(self.views), self.width).transpose(0, 1)

    @property
    def decoder_bias(self) -> Tensor:
        """[view, channel]."""
        return self.decoder_offset.view(len(self.views), self.width)

    @property
    def mean(self) -> Tensor:
        """[view, channel], raw units."""
        return self.means.view(len(self.views), self.width)

    # -- units ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_normalisation(self, moments: ViewMoments) -> None:
        """Set scale and mean from raw moments, and centre the biases on the normalised mean.

        The decoder biases start at the mean and the encoder bias cancels the mean, so that features start out
        describing deviations; both are trained from there.
        """
        width = torch.tensor(self.widths, dtype=torch.float64)
        self.scale.copy_(width.sqrt() / torch.from_numpy(moments.mean_norm))
        mean = torch.from_numpy(moments.mean)
        self.means.copy_(mean)
        self.decoder_offset.copy_(mean * self.channel_scale().double())
        self.encoder_bias.copy_(-(self.decoder_offset @ self.encoder_matrix))

    def channel_scale(self) -> Tensor:
        """The scale of each channel of a joint activation: [D]."""
        return self.scale.repeat_interleave(torch.tensor(self.widths, device=self.scale.device))

    def normalise(self, raw: Tensor | Sequence[Tensor]) -> Tensor:
        """Raw activations of all views (see ``join``) in normalised units, joint: [batch, D]."""
        return self.join(raw) * self.channel_scale()

    @property
    def has_joint_code(self) -> bool:
        """Whether it was trained to encode all views together; if not, it encodes one model at a time (swap)."""
        return not self.facts.get("one_model", False) and self.facts.get("objective") != "paired"

    # -- code -------------------------------------------------------------------------------------------------------

    def pre_activation(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Encoder output before the activation function, x in normalised units: [batch, feature]."""
        return torch.addmm(self.encoder_bias, self.join(x), self.encoder_matrix)

    def encode(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Features [batch, feature] of normalised activations of all views (see ``join``)."""
        pre = self.pre_activation(x)
        return self.gate(pre.dtype)(pre)

    def gate(self, dtype: torch.dtype = torch.float32, columns: Tensor | None = None) -> Gate:
        """The sparsity rule at inference, for all features or the ``columns`` alone.

        Raises
        ------
        InputError
            If a threshold has not been learned.
        """
        if self.sparsity == "l1":
            return Gate()
        norm = self.selection_norm().detach().double()
        if self.sparsity == "topk":
            norm = torch.ones_like(norm) if self.ranks_activations else norm
            return Gate(k=min(self.k, self.n_features), norm=norm.to(dtype))
        if not bool(torch.isfinite(self.threshold).all()):
            raise InputError(f"crosscoder {self.name!r} has no inference threshold yet; finish its training first.")
        # f_k norm_k > threshold as a limit on f_k; a feature without decoder gets an infinite one and is never active
        limit = torch.where(norm > 0, self.threshold / norm, math.inf).clamp_min(0.0)
        return Gate((limit if columns is None else limit[columns]).to(dtype))

    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """Joint reconstruction [batch, D] in normalised units of features [batch, feature]."""
        return matmul(f, self.decoder_matrix) + self.decoder_offset

    def reconstruct(self, f: Tensor | SparseCode, view: str, *, joint: bool = False) -> Tensor:
        """Reconstruction [batch, channel] of one view in RAW units.

        Parameters
        ----------
        f
            Features [batch, feature].
        view
            Which.
        joint
            Whether they are the joint code of all views, and not one model's: see :meth:`offset`.
        """
        own = self.decoder_matrix[:, self.slot_of(view)]
        if joint or self.shared_decoder is None:
            decoded = matmul(f, own) / self.scale[self.view_index(view)]
        else:
            decoded = matmul(f, self.shared_decoder)
        return decoded + self.offset(view, joint=joint)

    def offset(self, view: str, *, joint: bool = False) -> Tensor:
        """What a reconstruction is without any feature: [channel], RAW units.

        The joint code has an offset for each view. One model's features have, after training on them (objectives
        paired and both), the mean of these for all models, so that features must tell what changed on average: see
        :func:`~rlgen_stats.toolkit.crosscoder.training.rows.paired_rows`.
        """
        if joint or self.facts.get("objective") not in ("paired", "both"):
            return self.decoder_offset[self.slot_of(view)] / self.scale[self.view_index(view)]
        return shared_offset(self)

    def readout(
        self, raw: Tensor, *, view: str | None = None, kind: Readout = "swap", features: Tensor | None = None
    ) -> Tensor:
        """Features of ONE model's raw activations: [batch, feature]; see :meth:`readout_map`."""
        readout = self.readout_map(view=view, kind=kind, features=features)
        if raw.ndim != 2 or raw.shape[1] != len(readout.weight):
            raise InputError(
                f"crosscoder {self.name!r} expected activations of one model as [batch, {len(readout.weight)}], "
                f"got {tuple(raw.shape)}."
            )
        return readout(raw)

    def readout_map(
        self,
        *,
        view: str | None = None,
        kind: Readout = "swap",
        features: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> FeatureReadout:
        """The map from one model's raw activations to its features; build it once for many batches.

        Parameters
        ----------
        view
            The slot the model belongs to; needed by ``"own"`` only.
        kind
            ``"swap"``: the activation goes into every slot, each with its own scale. ``"own"``: into ``view``'s slot,
            all other slots at their means. ``"fit"``: through the one map that :func:`fit_readout` fitted.
        features
            Indices of the features to read; default all.
        dtype
            Type of the map.

        Raises
        ------
        InputError
            If ``kind`` is no readout of one model, ``"own"`` comes without a view, ``"swap"`` meets views of several
            widths, ``"fit"`` has not been fitted, or a threshold has not been learned.

        Notes
        -----
        f is one code for all views, so features of a single model are defined only by such a rule; numbers from
        different readouts are not comparable.
        """
        needs_all = self.sparsity == "topk"  # a token's k largest are known only from all features
        columns = None if features is None or needs_all else features
        matrix = self.encoder_matrix.to(dtype) if columns is None else self.encoder_matrix[:, columns].to(dtype)
        bias = self.encoder_bias.to(dtype) if columns is None else self.encoder_bias[columns].to(dtype)
        scale = self.scale.to(dtype)
        slots = self.slots()
        if kind == "swap":
            if len(set(self.widths)) > 1:
                raise InputError(
                    f"readout 'swap' puts one activation into every slot, but the views have the widths {self.widths}; "
                    "use readout 'own'."
                )
            parts = [matrix[channels] * factor for channels, factor in zip(slots, scale, strict=True)]
            weight = torch.stack(parts).sum(dim=0)
        elif kind == "own":
            if view is None:
                raise InputError("readout 'own' needs the view whose slot the activations take; pass view=.")
            model_slot = self.view_index(view)
            weight = matrix[slots[model_slot]] * scale[model_slot]
            means = self.means.to(dtype)
            if not bool(torch.isfinite(means).all()):
                raise InputError(
                    f"the means of the activations behind crosscoder {self.name!r} are not known (imported weights "
                    "without a normaliser), so the other slots cannot be put there; use readout 'swap'."
                )
            for slot, channels in enumerate(slots):
                if slot != model_slot:
                    bias = bias + (means[channels] * scale[slot]) @ matrix[channels]
        elif kind == "fit":
            if self.fit_weight is None or self.fit_bias is None:
                raise InputError(
                    f"readout 'fit' of crosscoder {self.name!r} has not been fitted; call fit_readout(crosscoder, "
                    "reader) with activations of its views, or run the crosscoder stage with readout: fit."
                )
            chosen = slice(None) if columns is None else columns
            weight, bias = self.fit_weight[:, chosen].to(dtype), self.fit_bias[chosen].to(dtype)
        else:
            raise InputError(f"the readout of one model is 'swap', 'own' or 'fit', got {kind!r}.")
        return FeatureReadout(weight, bias, self.gate(dtype, columns), features if needs_all else None)

    # -- decoder geometry -------------------------------------------------------------------------------------------

    def decoder_norm(self) -> Tensor:
        """||d_mk||, L2, normalised units: [view, feature]."""
        return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in self.split(self.decoder_matrix)])

    def selection_norm(self) -> Tensor:
        """Sum over views of ||d_mk||, the factor in the sparsity rule: [feature]."""
        return self.decoder_norm().sum(dim=0)

    def contribution_norm(self) -> Tensor:
        """||d_k|| over all views' rows together (L2, normalised units); f_k ||d_k|| is scale-invariant: [feature]."""
        norm: Tensor = torch.linalg.vector_norm(self.decoder_matrix, dim=1)
        return norm

    def feature_direction(self, view: str, *, joint: bool = False) -> Tensor:
        """What one unit of f_k adds to that model's residual, RAW units (decoder rows / scale): [feature, channel].

        The joint code has directions for each view. One model's features have, after training on them, the mean of
        these for all models, so that features, not directions, must tell what changed: see
        :func:`~rlgen_stats.toolkit.crosscoder.training.rows.paired_rows`.
        """
        own = self.decoder_matrix[:, self.slot_of(view)]
        if joint or self.shared_decoder is None:
            return own / self.scale[self.view_index(view)]
        return self.shared_decoder

    def share_decoder(self) -> None:
        """Decode every model's own features as paired rows train them: with the mean of the views' decoders."""
        self.shared_decoder = shared_directions(self).detach()

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write weights.safetensors and spec.json; ``weights_sha256`` becomes the hash of the weights file."""
        weights = Path(folder) / WEIGHTS
        write_tensors(weights, dict(self.state_dict()), {"format_version": FORMAT_VERSION})
        self.weights_sha256 = file_sha256(weights)
        write_json(Path(folder) / SPEC, self.describe())
        self.folder = Path(folder)

    def describe(self) -> dict[str, Any]:
        """Contents of spec.json."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "views": list(self.views),
            "widths": list(self.widths),
            "n_features": self.n_features,
            "sparsity": self.sparsity,
            "k": self.k,
            "exclusive": {view: part.stop - part.start for view, part in self.exclusive.items()},
            "readout": self.default_readout,
            "weights_sha256": self.weights_sha256,
            "facts": self.facts,
        } | ({"ranks_activations": True} if self.ranks_activations else {})


def shared_directions(crosscoder: Crosscoder) -> Tensor:
    """The mean of all views' decoders: [feature, channel], RAW units."""
    by_view = crosscoder.decoder_matrix.view(crosscoder.n_features, len(crosscoder.views), -1)
    return (by_view / crosscoder.scale[:, None]).mean(dim=1)


def shared_offset(crosscoder: Crosscoder) -> Tensor:
    """The mean of all views' decoder offsets: [channel], RAW units."""
    return (crosscoder.decoder_bias / crosscoder.scale[:, None]).mean(dim=0)
