"""The crosscoder: one sparse code for several views of the same token.

Shapes: V views, d channels (``width``), F features. Normalised units are raw units times one scalar per view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rlgen_stats.schemas.errors import InputError, StoreCorruptError, StoreError
from rlgen_stats.stores import read_json, write_json
from rlgen_stats.toolkit.crosscoder.files import read_tensors, sha256, write_tensors
from rlgen_stats.toolkit.crosscoder.reader import ViewMoments

FORMAT_VERSION: Final = 1
WEIGHTS: Final = "weights.safetensors"
SPEC: Final = "spec.json"

Sparsity = Literal["l1", "batchtopk"]
Readout = Literal["swap", "own"]

INITIAL_NORM: Final = 0.4
"""Initial decoder norm of a feature over all views: below 1, so that features grow into the data instead of
shrinking out of it, and large enough that the first reconstructions are not negligible."""

_FIELDS: Final = (
    "format_version",
    "name",
    "views",
    "width",
    "n_features",
    "sparsity",
    "k",
    "readout",
    "weights_sha256",
)


class Crosscoder(nn.Module):
    """One code f for all views: f = act(sum_m W_m a_m + b), a_hat_m = D_m f + c_m.

    Parameters
    ----------
    views
        Model ids, one a slot.
    width
        Channels d of every view.
    n_features
        Dictionary size F.
    sparsity
        ``"l1"``: act is a ReLU. ``"batchtopk"``: a ReLU that keeps f_k where f_k sum_m ||d_mk|| exceeds ``threshold``.
    k
        Mean number of active features a token was trained for (batchtopk).
    readout
        Declared readout of one model's features, ``"swap"`` or ``"own"``.
    name
        Name in the study.
    seed
        Seed of the initial weights.

    Attributes
    ----------
    scale : Tensor [view]
        normalised = raw * scale; the mean norm of a normalised token is sqrt(d).
    mean : Tensor [view, channel]
        Raw means.
    encoder, decoder : Parameter [view, channel, feature], [view, feature, channel]
        Normalised units. In memory the decoder is [feature, view, channel], one matrix for all views.
    encoder_bias, decoder_bias : Parameter [feature], [view, channel]
        Normalised units.
    threshold : Tensor [], float64
        Inference threshold of batchtopk; NaN until learned, unused for l1.
    facts : dict
        Where the weights come from (seed, steps, data); saved with them.
    weights_sha256 : str
        Hash of the saved weights, empty before saving.
    folder : Path or None
        Where it was saved or loaded.

    References
    ----------
    Lindsey et al. (2024), Sparse crosscoders, https://transformer-circuits.pub/2024/crosscoders/; Bussmann et al.
    (2024), arXiv:2412.06410 (BatchTopK); Minder et al. (2025), arXiv:2504.02922 (BatchTopK crosscoders).
    """

    encoder: nn.Parameter
    decoder: nn.Parameter
    encoder_bias: nn.Parameter
    decoder_bias: nn.Parameter
    scale: Tensor
    mean: Tensor
    threshold: Tensor

    def __init__(
        self,
        views: Sequence[str],
        *,
        width: int,
        n_features: int,
        sparsity: Sparsity,
        k: int,
        readout: Readout = "swap",
        name: str = "crosscoder",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(views)) != len(views) or not views:
            raise InputError(f"the views of a crosscoder must be distinct model ids, got {list(views)}.")
        self.views, self.name = tuple(views), name
        self.width, self.n_features, self.k = int(width), int(n_features), int(k)
        self.sparsity: Sparsity = sparsity
        self.default_readout: Readout = readout
        self.facts: dict[str, Any] = {}
        self.weights_sha256 = ""
        self.folder: Path | None = None
        n_views = len(self.views)
        rows = torch.randn(n_features, width, generator=torch.Generator().manual_seed(seed))
        rows *= INITIAL_NORM / math.sqrt(n_views) / rows.norm(dim=1, keepdim=True)
        self.decoder = nn.Parameter(rows.repeat_interleave(n_views, 0).view(n_features, n_views, width).transpose(0, 1))
        self.encoder = nn.Parameter(rows.T.repeat(n_views, 1, 1).contiguous())
        self.encoder_bias = nn.Parameter(torch.zeros(n_features))
        self.decoder_bias = nn.Parameter(torch.zeros(n_views, width))
        self.register_buffer("scale", torch.ones(n_views))
        self.register_buffer("mean", torch.zeros(n_views, width))
        self.register_buffer("threshold", torch.tensor(math.nan, dtype=torch.float64))

    # -- units ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_normalisation(self, moments: ViewMoments) -> None:
        """Set scale and mean from raw moments, and centre the biases on the normalised mean.

        The decoder biases start at the mean and the encoder bias cancels the mean, so that features start out
        describing deviations; both are trained from there.
        """
        scale = torch.from_numpy(math.sqrt(self.width) / moments.mean_norm)
        mean = torch.from_numpy(moments.mean)
        self.scale.copy_(scale)
        self.mean.copy_(mean)
        self.decoder_bias.copy_(mean * scale[:, None])
        self.encoder_bias.copy_(-torch.einsum("vc,vcf->f", self.decoder_bias, self.encoder))

    def view_index(self, view: str) -> int:
        """Slot of a view.

        Raises
        ------
        InputError
            If there is no such view; the message lists them.
        """
        if view not in self.views:
            raise InputError(f"crosscoder {self.name!r} has no view {view!r}; its views are {', '.join(self.views)}.")
        return self.views.index(view)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw activations [batch, view, channel] in normalised units."""
        self._check(raw, (len(self.views), self.width), "activations of all views")
        return raw * self.scale[:, None]

    # -- code -------------------------------------------------------------------------------------------------------

    def pre_activation(self, x: Tensor) -> Tensor:
        """Encoder output before the activation function, x in normalised units: [batch, feature]."""
        weight = self.encoder.reshape(-1, self.n_features)
        return torch.addmm(self.encoder_bias, x.reshape(len(x), -1), weight)

    def encode(self, x: Tensor) -> Tensor:
        """Features [batch, feature] of normalised activations [batch, view, channel] of all views."""
        self._check(x, (len(self.views), self.width), "normalised activations of all views")
        return self.activate(self.pre_activation(x))

    def activate(self, pre: Tensor, features: Tensor | None = None) -> Tensor:
        """The activation function at inference, for all features or the columns ``features``.

        Raises
        ------
        InputError
            If batchtopk has not learned its threshold.
        """
        active = torch.relu(pre)
        if self.sparsity == "l1":
            return active
        if not bool(torch.isfinite(self.threshold)):
            raise InputError(f"crosscoder {self.name!r} has no inference threshold yet; finish its training first.")
        limit = self.threshold.to(pre.dtype) / self.selection_norm().to(pre.dtype)  # f_k * norm_k > threshold
        return active * (active > (limit if features is None else limit[features]))

    def decode(self, f: Tensor) -> Tensor:
        """Reconstruction [batch, view, channel] in normalised units of features [batch, feature]."""
        weight = self.decoder.transpose(0, 1).reshape(self.n_features, -1)
        flat = torch.addmm(self.decoder_bias.reshape(-1), f, weight)
        return flat.reshape(len(f), len(self.views), self.width)

    def reconstruct(self, f: Tensor, view: str) -> Tensor:
        """Reconstruction [batch, channel] of one view in RAW units."""
        slot = self.view_index(view)
        return torch.addmm(self.decoder_bias[slot], f, self.decoder[slot]) / self.scale[slot]

    def readout(
        self, raw: Tensor, *, view: str | None = None, kind: Readout = "swap", features: Tensor | None = None
    ) -> Tensor:
        """Features of ONE model's raw activations: [batch, feature].

        Parameters
        ----------
        raw
            [batch, channel], raw units.
        view
            The slot the model belongs to; needed by ``"own"`` only.
        kind
            ``"swap"``: ``raw`` goes into every slot, each with its own scale. ``"own"``: into ``view``'s slot, all
            other slots at their means.
        features
            Indices of the features wanted; default all.

        Raises
        ------
        InputError
            If the width differs, ``kind`` is unknown, or ``"own"`` comes without a view.

        Notes
        -----
        f is one code for all views, so a model's own features exist only after such a declaration; numbers from
        different readouts are not comparable.
        """
        self._check(raw, (self.width,), "activations of one model")
        bias: Tensor = self.encoder_bias
        if kind == "swap":
            weight: Tensor = torch.einsum("v,vcf->cf", self.scale, self.encoder)
        elif kind == "own":
            if view is None:
                raise InputError("readout 'own' needs the view whose slot the activations take; pass view=.")
            slot = self.view_index(view)
            weight = self.encoder[slot] * self.scale[slot]
            at_mean = self.mean * self.scale[:, None]
            others = [other for other in range(len(self.views)) if other != slot]
            bias = bias + torch.einsum("vc,vcf->f", at_mean[others], self.encoder[others])
        else:
            raise InputError(f"a readout is 'swap' or 'own', got {kind!r}.")
        if features is not None:
            weight, bias = weight[:, features], bias[features]
        return self.activate(torch.addmm(bias, raw.to(weight.dtype), weight), features)

    # -- decoder geometry -------------------------------------------------------------------------------------------

    def decoder_norm(self) -> Tensor:
        """||d_mk||, L2, normalised units: [view, feature]."""
        norm: Tensor = torch.linalg.vector_norm(self.decoder, dim=-1)
        return norm

    def selection_norm(self) -> Tensor:
        """Sum over views of ||d_mk||, the factor in the sparsity rule: [feature]."""
        return self.decoder_norm().sum(dim=0)

    def contribution_norm(self) -> Tensor:
        """||d_k|| over all views' rows together (L2, normalised units); f_k ||d_k|| is gauge free: [feature]."""
        norm: Tensor = torch.linalg.vector_norm(self.decoder, dim=(0, -1))
        return norm

    def feature_direction(self, view: str) -> Tensor:
        """What one unit of f_k adds to that model's residual, RAW units (decoder rows / scale): [feature, channel]."""
        slot = self.view_index(view)
        return self.decoder[slot] / self.scale[slot]

    def _check(self, array: Tensor, trailing: tuple[int, ...], what: str) -> None:
        if array.ndim != len(trailing) + 1 or tuple(array.shape[1:]) != trailing:
            wanted = ", ".join(map(str, ("batch", *trailing)))
            raise InputError(f"crosscoder {self.name!r} expected {what} as [{wanted}], got {tuple(array.shape)}.")

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write weights.safetensors and spec.json; ``weights_sha256`` becomes the hash of the weights file."""
        weights = Path(folder) / WEIGHTS
        write_tensors(weights, dict(self.state_dict()), {"format_version": FORMAT_VERSION})
        self.weights_sha256 = sha256(weights)
        write_json(Path(folder) / SPEC, self.describe())
        self.folder = Path(folder)

    def describe(self) -> dict[str, Any]:
        """Contents of spec.json."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "views": list(self.views),
            "width": self.width,
            "n_features": self.n_features,
            "sparsity": self.sparsity,
            "k": self.k,
            "readout": self.default_readout,
            "weights_sha256": self.weights_sha256,
            "facts": self.facts,
        }


def load_crosscoder(folder: Path | str, *, device: str | torch.device = "cpu") -> Crosscoder:
    """A saved crosscoder, in evaluation mode.

    Parameters
    ----------
    folder
        Folder with weights.safetensors and spec.json.
    device
        Torch device.

    Raises
    ------
    StoreError
        If a file is missing, the format is newer, a field is missing, or a tensor has another shape than declared.
    StoreCorruptError
        If the weights are not the bytes that were saved.

    Examples
    --------
    >>> crosscoder = load_crosscoder("runs/demo/crosscoder/main")  # doctest: +SKIP
    >>> crosscoder.feature_direction("rl@80").shape  # doctest: +SKIP
    """
    folder = Path(folder)
    described = _read_spec(folder)
    crosscoder = Crosscoder(
        described["views"],
        width=described["width"],
        n_features=described["n_features"],
        sparsity=described["sparsity"],
        k=described["k"],
        readout=described["readout"],
        name=described["name"],
    )
    crosscoder.facts = dict(described.get("facts", {}))
    crosscoder.weights_sha256, crosscoder.folder = described["weights_sha256"], folder
    tensors = _read_weights(folder / WEIGHTS, described)
    for name, wanted in crosscoder.state_dict().items():
        if name not in tensors or tensors[name].shape != wanted.shape:
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise StoreError(
                f"{folder / WEIGHTS}: tensor {name!r} must have shape {tuple(wanted.shape)} for "
                f"{len(crosscoder.views)} views of width {crosscoder.width} and {crosscoder.n_features} features, "
                f"got {got}; the weights and {SPEC} do not belong together: train the crosscoder again."
            )
    crosscoder.load_state_dict(tensors)
    return crosscoder.requires_grad_(False).eval().to(device)


def _read_spec(folder: Path) -> dict[str, Any]:
    for name in (SPEC, WEIGHTS):
        if not (folder / name).exists():
            raise StoreError(
                f"{folder} holds no finished crosscoder: {name} is missing; run the crosscoder stage or fix the path."
            )
    described = read_json(folder / SPEC)
    version = described.get("format_version") if isinstance(described, dict) else None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{folder / SPEC} has crosscoder format version {version!r}, this release reads {FORMAT_VERSION}; "
            "use a matching release of rlgen-stats or train again."
        )
    missing = [field for field in _FIELDS if field not in described]
    if missing:
        raise StoreError(f"{folder / SPEC} lacks {missing}; expected {list(_FIELDS)}: train the crosscoder again.")
    return dict(described)


def _read_weights(file: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    digest = sha256(file)
    if digest != described["weights_sha256"]:
        raise StoreCorruptError(
            f"{file} is not the file that was saved (SHA-256 {digest[:12]}, expected "
            f"{described['weights_sha256'][:12]}); restore it or train the crosscoder again."
        )
    return read_tensors(file)[0]
