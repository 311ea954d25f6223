"""Edits in a live model against a reference that runs the blocks one by one, without hooks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlgen_stats.schemas.errors import InputError, RefusedError
from rlgen_stats.toolkit.crosscoder import Crosscoder
from rlgen_stats.toolkit.edits.edit import FeatureEdit
from rlgen_stats.toolkit.edits.hooks import SourceModel, amplify, disable, editing
from rlgen_stats.toolkit.edits.site import EditSite, FeatureColumns
from rlgen_stats.toolkit.extraction.generation import generate
from rlgen_stats.toolkit.extraction.residual_stream import locate_layers
from tests.edits.tiny import (
    BASE,
    CONFIGS,
    N_FEATURES,
    RL,
    VOCABULARY,
    WIDTH,
    batch_of,
    n_hooks,
    tiny_crosscoder,
    tiny_model,
)
from tests.extraction.test_architectures import tiny

LAYER = 1
SET = (0, 3, 4, 9, 17)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def site(crosscoder: Crosscoder, view: str = RL, layer: int = LAYER) -> EditSite:
    return EditSite(crosscoder, view, layer)


def reference_edit(
    a: Tensor, crosscoder: Crosscoder, view: str, features: tuple[int, ...], multiplier: float
) -> Tensor:
    """One token at a time, one feature at a time, through the crosscoder's own encoder and in float64."""
    v = crosscoder.views.index(view)
    edited = a.double().clone()
    for token in range(len(a)):
        raw = a[token].double()
        for k in features:
            pre = crosscoder.encoder_bias[k].double()
            for w in range(len(crosscoder.views)):
                pre = pre + crosscoder.scale[w].double() * raw @ crosscoder.encoder[w, :, k].double()
            f = max(float(pre), 0.0)
            norms = sum(float(crosscoder.decoder[w, k].double().norm()) for w in range(len(crosscoder.views)))
            if crosscoder.sparsity == "batchtopk" and not f * norms > float(crosscoder.threshold):
                f = 0.0
            edited[token] += (multiplier - 1.0) * f * crosscoder.decoder[v, k].double() / crosscoder.scale[v].double()
    return edited.to(a.dtype)


def reference_logits(model: Any, ids: Tensor, edit: Any) -> Tensor:
    """Logits of one unpadded Qwen3 text, block after block; ``edit`` maps the output of block LAYER."""
    inner = model.model
    hidden = inner.embed_tokens(ids[None])
    positions = torch.arange(len(ids))[None]
    rotary = inner.rotary_emb(hidden, positions)
    length = len(ids)
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    for index, block in enumerate(inner.layers):
        out = block(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
        if index == LAYER:
            hidden = edit(hidden[0])[None]
    return model.lm_head(inner.norm(hidden))[0]


@pytest.mark.parametrize("sparsity", ["l1", "batchtopk"])
@pytest.mark.parametrize(("kind", "dose", "multiplier"), [("disable", None, 0.0), ("amplify", 2.5, 2.5)])
@pytest.mark.parametrize("view", [BASE, RL])
def test_edits_equal_a_forward_pass_by_hand(
    model: Any, sparsity: str, kind: Any, dose: float | None, multiplier: float, view: str
) -> None:
    crosscoder = tiny_crosscoder(sparsity=sparsity)
    lengths = (9, 4, 6)
    ids, mask, positions = batch_of(*lengths)
    with editing(model, FeatureEdit(SET, kind, dose), site(crosscoder, view)):
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    plain = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        text = ids[row, -length:]
        expected = reference_logits(model, text, lambda a: reference_edit(a, crosscoder, view, SET, multiplier))
        torch.testing.assert_close(got[row, -length:], expected, **CLOSE)
        assert (plain[row, -length:] - expected).abs().max() > 0.01, (
            "the edit must do something for this test to say so"
        )


def test_skip_first_leaves_leading_tokens_alone(model: Any, crosscoder: Crosscoder) -> None:
    ids, mask, positions = batch_of(8, 5)
    with disable(model, FeatureEdit(SET, "disable", skip_first=2), site(crosscoder)):
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate((8, 5)):

        def edit(a: Tensor) -> Tensor:
            return torch.cat([a[:2], reference_edit(a[2:], crosscoder, RL, SET, 0.0)])

        torch.testing.assert_close(got[row, -length:], reference_logits(model, ids[row, -length:], edit), **CLOSE)


def test_plain_feature_ids_are_edited_at_every_token(model: Any, crosscoder: Crosscoder) -> None:
    ids, mask, positions = batch_of(8, 5)
    for short, edit in (
        (disable(model, SET, site(crosscoder)), FeatureEdit(SET, "disable")),
        (amplify(model, SET, site(crosscoder), dose=2.5), FeatureEdit(SET, "amplify", 2.5)),
    ):
        with short:
            got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        with editing(model, edit, site(crosscoder)):
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(got, expected)
    with pytest.raises(InputError, match="needs a dose"), amplify(model, SET, site(crosscoder)):
        pass
    whole = FeatureEdit(SET, "amplify", 2.0)
    with pytest.raises(InputError, match="has its own dose, 2"), amplify(model, whole, site(crosscoder), dose=3.0):
        pass


def test_the_old_name_of_the_source_model_still_works(model: Any, crosscoder: Crosscoder) -> None:
    with pytest.warns(DeprecationWarning, match="SourceModel"):
        from rlgen_stats.toolkit.intervention import Donor
    assert Donor is SourceModel
    lift = FeatureEdit(SET, "lift")
    with (
        pytest.warns(DeprecationWarning, match="source="),
        editing(model, lift, site(crosscoder, BASE), donor=Donor(tiny_model(seed=5), RL)),
    ):
        pass


@pytest.mark.parametrize("positions", ["prompt", "last_prompt", "completion", "all"])
@pytest.mark.parametrize("phases", [("prefill",), ("decode",), ("prefill", "decode")])
def test_positions_and_phases_of_a_whole_text(model: Any, crosscoder: Crosscoder, positions: Any, phases: Any) -> None:
    ids, mask, place = batch_of(9, 7)
    prompt = (5, 3)
    edit = FeatureEdit(SET, "disable", positions=positions, phases=phases)
    with editing(model, edit, site(crosscoder)) as active:
        active.prompt_lengths = torch.tensor(prompt)
        got = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits
    for row, length in enumerate((9, 7)):
        wanted_positions = {
            "all": range(length),
            "prompt": range(prompt[row]),
            "last_prompt": [prompt[row] - 1],
            "completion": range(prompt[row] - 1, length),
        }[positions]
        chosen = [p for p in wanted_positions if ("prefill" if p < prompt[row] else "decode") in phases]

        def by_hand(a: Tensor, chosen: list[int] = chosen) -> Tensor:
            edited = a.clone()
            if chosen:
                edited[chosen] = reference_edit(a[chosen], crosscoder, RL, SET, 0.0)
            return edited

        torch.testing.assert_close(got[row, -length:], reference_logits(model, ids[row, -length:], by_hand), **CLOSE)


@pytest.mark.parametrize("positions", ["all", "completion", "last_prompt"])
def test_cache_on_and_off_agree(model: Any, crosscoder: Crosscoder, positions: Any) -> None:
    ids, mask, place = batch_of(9, 7)
    prompt = 5
    edit = FeatureEdit(SET, "amplify", 3.0, positions=positions)
    with editing(model, edit, site(crosscoder)) as active:
        first = model(
            input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=place[:, :prompt], use_cache=True
        )
        steps = [first.logits]
        cache = first.past_key_values
        for t in range(prompt, 9):
            out = model(
                input_ids=ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=place[:, t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(out.logits)
        active.prompt_lengths = torch.tensor([prompt, prompt - 2])
        whole = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits
    cached = torch.cat(steps, dim=1)
    for row, length in enumerate((9, 7)):
        torch.testing.assert_close(cached[row, -length:], whole[row, -length:], **CLOSE)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_architecture_padded_alone_and_right_padded(kind: str, crosscoder: Crosscoder) -> None:
    model = tiny_model(kind)
    lengths = (8, 3, 5)
    ids, mask, place = batch_of(*lengths)
    edit, where = FeatureEdit(SET, "disable", skip_first=1), site(crosscoder)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
    with disable(model, edit, where):
        together = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
        for row, length in enumerate(lengths):
            text = ids[row, -length:]
            alone = model(input_ids=text[None]).logits[0]
            torch.testing.assert_close(together[row, -length:], alone, **CLOSE)
            right = torch.nn.functional.pad(text, (0, 8 - length))[None]
            right_mask = torch.nn.functional.pad(torch.ones(length, dtype=torch.long), (0, 8 - length))[None]
            padded = model(input_ids=right, attention_mask=right_mask).logits[0, :length]
            torch.testing.assert_close(padded, alone, **CLOSE)
    assert (together - plain).abs().max() > 1e-3
    assert torch.equal(model(input_ids=ids, attention_mask=mask, position_ids=place).logits, plain)


class EditedBlock(torch.nn.Module):
    """A decoder block whose output goes through a function: the same model without any hook."""

    def __init__(self, block: torch.nn.Module, edit: Any) -> None:
        super().__init__()
        self.block, self.edit = block, edit

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        return (self.edit(out[0]), *out[1:]) if isinstance(out, tuple) else self.edit(out)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, CLOSE), (torch.bfloat16, {"rtol": 0.05, "atol": 0.05})])
def test_every_architecture_cached_and_padded_equals_whole_texts_without_hooks(
    kind: str, dtype: torch.dtype, close: Any
) -> None:
    crosscoder = tiny_crosscoder(sparsity="l1")  # without a jump at the threshold, which rounding could cross
    model, expected = tiny_model(kind).to(dtype), tiny_model(kind).to(dtype)
    blocks = locate_layers(expected)
    blocks[LAYER] = EditedBlock(
        blocks[LAYER], lambda a: torch.stack([reference_edit(row.float(), crosscoder, RL, SET, 2.5) for row in a]).to(a)
    )
    lengths, prompt = (9, 4, 6), 6
    ids, mask, place = batch_of(*lengths)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
    with amplify(model, FeatureEdit(SET, "amplify", 2.5), site(crosscoder)):
        steps, cache = [], None
        for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, max(lengths)))):
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=place[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(out.logits)
            cache = out.past_key_values
    got = torch.cat(steps, dim=1)
    for row, length in enumerate(lengths):
        alone = expected(input_ids=ids[row : row + 1, -length:], use_cache=False).logits[0]
        torch.testing.assert_close(got[row, -length:], alone, **close)
        assert (plain[row, -length:] - alone).abs().max() > 0.2, "the edit must be larger than the tolerance"


@pytest.mark.parametrize(
    "edit", [FeatureEdit(SET, "disable", skip_first=1), FeatureEdit(SET, "amplify", 2.0, level=(0.3,) * len(SET))]
)
def test_an_offloaded_model_is_edited_where_it_computes(
    model: Any, crosscoder: Crosscoder, tmp_path: Path, edit: FeatureEdit
) -> None:
    """Weights on disk until their turn, as a device map leaves them that does not fit."""
    ids, mask, place = batch_of(8, 5)
    with editing(model, edit, site(crosscoder)):
        expected = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
    model.save_pretrained(tmp_path / "saved")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=where, offload_folder=tmp_path / "offload"
    )
    assert next(loaded.model.layers[LAYER].parameters()).device.type == "meta"
    with torch.no_grad(), editing(loaded, edit, site(crosscoder)):
        torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask, position_ids=place).logits, expected)


# -- declared levels


def test_a_declared_level_is_added_to_every_token(model: Any, crosscoder: Crosscoder) -> None:
    text, level = batch_of(7)[0], (0.5, 0.0, 1.5, 0.2, 3.0)
    for dose in (3.0, 1.0, 0.5):

        def raise_(a: Tensor, dose: float = dose) -> Tensor:
            f = crosscoder.readout(a, kind="swap")[:, list(SET)]
            change = torch.stack([(f[:, j] + (dose - 1) * level[j]).relu() - f[:, j] for j in range(len(SET))], dim=1)
            return a + change @ crosscoder.feature_direction(BASE)[list(SET)]

        with amplify(model, FeatureEdit(SET, "amplify", dose, level=level), site(crosscoder, BASE)):
            got = model(input_ids=text).logits[0]
        torch.testing.assert_close(got, reference_logits(model, text[0], raise_), **CLOSE)


# -- no-ops, restoration, leaks


@pytest.mark.parametrize("kind", ["disable", "amplify", "lift"])
def test_an_empty_edit_changes_no_bit_and_installs_nothing(model: Any, crosscoder: Crosscoder, kind: Any) -> None:
    ids, mask, place = batch_of(6, 4)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
    before = n_hooks(model)
    source = SourceModel(tiny_model(seed=5), RL) if kind == "lift" else None
    with editing(model, FeatureEdit((), kind, 2.0 if kind == "amplify" else None), site(crosscoder), source=source):
        assert n_hooks(model) == before
        assert torch.equal(model(input_ids=ids, attention_mask=mask, position_ids=place).logits, plain)


@pytest.mark.parametrize("features", [(), SET])
def test_passthrough_is_a_no_op_to_float_tolerance(model: Any, crosscoder: Crosscoder, features: Any) -> None:
    ids, mask, place = batch_of(6, 4)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
    with editing(model, FeatureEdit(features, "passthrough"), site(crosscoder)) as active:
        active.track = True
        got = model(input_ids=ids, attention_mask=mask, position_ids=place).logits
    assert active.relative_norm < 1e-6
    torch.testing.assert_close(got[mask.bool()], plain[mask.bool()], rtol=1e-4, atol=1e-4)


def test_amplify_by_one_is_a_no_op(model: Any, crosscoder: Crosscoder) -> None:
    ids, _, _ = batch_of(6)
    plain = model(input_ids=ids).logits
    with amplify(model, FeatureEdit(SET, "amplify", 1.0), site(crosscoder)):
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_the_model_is_restored_after_an_exception(model: Any, crosscoder: Crosscoder) -> None:
    ids, _, _ = batch_of(6)
    plain, before = model(input_ids=ids).logits, n_hooks(model)
    source = tiny_model(seed=5)
    source_before = n_hooks(source)
    seen = []

    def fail_inside() -> None:
        with editing(model, FeatureEdit(SET, "lift"), site(crosscoder, BASE), source=SourceModel(source, RL)):
            seen.extend([n_hooks(model) > before, not torch.equal(model(input_ids=ids).logits, plain)])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert seen == [True, True]
    assert n_hooks(model) == before
    assert n_hooks(source) == source_before
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_nothing_leaks_when_an_edit_is_refused(model: Any, crosscoder: Crosscoder) -> None:
    before = n_hooks(model)
    with (
        pytest.raises(InputError, match="0 to 23"),
        disable(model, FeatureEdit((N_FEATURES,), "disable"), site(crosscoder)),
    ):
        pass
    assert n_hooks(model) == before


def test_nested_edits_compose_outside_in(model: Any, crosscoder: Crosscoder) -> None:
    text = batch_of(7)[0]
    first, second = (0, 3, 4), (4, 9, 17)
    with (
        disable(model, FeatureEdit(first, "disable"), site(crosscoder)),
        amplify(model, FeatureEdit(second, "amplify", 2.0), site(crosscoder)),
    ):
        got = model(input_ids=text).logits[0]

    def both(a: Tensor) -> Tensor:
        return reference_edit(reference_edit(a, crosscoder, RL, first, 0.0), crosscoder, RL, second, 2.0)

    torch.testing.assert_close(got, reference_logits(model, text[0], both), **CLOSE)


def test_bfloat16_models_keep_their_type(crosscoder: Crosscoder) -> None:
    model = tiny_model().to(torch.bfloat16)
    with disable(model, FeatureEdit(SET, "disable"), site(crosscoder)):
        assert model(input_ids=batch_of(6)[0]).logits.dtype == torch.bfloat16


def test_columns_equal_the_crosscoders_readout(crosscoder: Crosscoder) -> None:
    raw = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))
    for kind in ("swap", "own"):
        columns = FeatureColumns(EditSite(crosscoder, RL, LAYER, kind), SET)
        expected = crosscoder.readout(raw, view=RL, kind=kind)[:, list(SET)]
        assert 0.1 < float((expected > 0).float().mean()) < 0.9
        torch.testing.assert_close(columns.read(raw), expected, **CLOSE)
        torch.testing.assert_close(columns.directions, crosscoder.feature_direction(RL)[list(SET)], **CLOSE)


def test_after_paired_training_an_edit_writes_with_the_decoder_of_all_models(crosscoder: Crosscoder) -> None:
    shared = deepcopy(crosscoder)
    shared.share_decoder()
    mean = torch.stack([crosscoder.feature_direction(view) for view in crosscoder.views]).mean(dim=0)
    columns = FeatureColumns(EditSite(shared, RL, LAYER), SET)
    torch.testing.assert_close(columns.directions, mean[list(SET)], **CLOSE)
    assert (columns.directions - crosscoder.feature_direction(RL)[list(SET)]).norm() > 0.1


# -- lift, vectors, generation


def residual_after_the_block(model: Any, ids: Tensor) -> Tensor:
    """[token, channel] that reaches the next block, read at its input."""
    seen: list[Tensor] = []
    handle = model.model.layers[LAYER + 1].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    model(input_ids=ids)
    handle.remove()
    return seen[0]


def test_lift_writes_each_models_features_with_its_own_decoder(model: Any, crosscoder: Crosscoder) -> None:
    source, text = tiny_model(seed=5), batch_of(7)[0]
    residuals: list[Tensor] = []
    reference_logits(source, text[0], lambda a: residuals.append(a) or a)
    with editing(model, FeatureEdit(SET, "lift", 0.5), site(crosscoder, BASE), source=SourceModel(source, RL)):
        got = model(input_ids=text).logits[0]

    def lift(a: Tensor) -> Tensor:
        change = torch.zeros_like(a)
        for k in SET:
            of_source, own = (crosscoder.readout(x, kind="swap")[:, k] for x in (residuals[0], a))
            change += torch.outer(of_source, crosscoder.feature_direction(RL)[k])
            change -= torch.outer(own, crosscoder.feature_direction(BASE)[k])
        return a + 0.5 * change

    torch.testing.assert_close(got, reference_logits(model, text[0], lift), **CLOSE)


def test_lift_from_itself_is_a_no_op(model: Any, crosscoder: Crosscoder) -> None:
    text = batch_of(7)[0]
    with editing(model, FeatureEdit(SET, "lift"), site(crosscoder, BASE), source=SourceModel(tiny_model(), BASE)):
        got = model(input_ids=text).logits
    torch.testing.assert_close(got, model(input_ids=text).logits, **CLOSE)


def test_a_full_patch_puts_the_source_models_residual_at_the_edited_positions(
    model: Any, crosscoder: Crosscoder
) -> None:
    source, text = tiny_model(seed=5), batch_of(7)[0]
    plain, other = residual_after_the_block(model, text), residual_after_the_block(source, text)
    for positions, edited in (("all", range(2, 7)), ("last_prompt", [6])):
        edit = FeatureEdit((), "patch", positions=positions, skip_first=2)
        with editing(model, edit, site(crosscoder, BASE), source=SourceModel(source, RL)):
            got = residual_after_the_block(model, text)
        for token in range(7):
            torch.testing.assert_close(got[token], (other if token in edited else plain)[token], **CLOSE)


def test_from_a_patched_block_on_everything_is_the_source_where_later_blocks_are_equal(crosscoder: Crosscoder) -> None:
    model, source, text = tiny_model(), tiny_model(seed=5), batch_of(7)[0]
    for later in range(LAYER + 1, len(model.model.layers)):
        source.model.layers[later] = model.model.layers[later]
    source.model.norm, source.lm_head = model.model.norm, model.lm_head
    with editing(model, FeatureEdit((), "patch"), site(crosscoder, BASE), source=SourceModel(source, RL)):
        got = model(input_ids=text).logits
    torch.testing.assert_close(got, source(input_ids=text).logits, **CLOSE)


def test_all_features_their_offsets_and_the_errors_make_up_the_full_patch(model: Any, crosscoder: Crosscoder) -> None:
    source, text = tiny_model(seed=5), batch_of(7)[0]
    plain, other = residual_after_the_block(model, text), residual_after_the_block(source, text)
    everything = FeatureEdit(tuple(range(crosscoder.n_features)), "lift")
    with editing(model, everything, site(crosscoder, BASE), source=SourceModel(source, RL)):
        lifted = residual_after_the_block(model, text)
    codes = {view: crosscoder.readout(a, kind="swap") for view, a in ((BASE, plain), (RL, other))}
    errors = (other - crosscoder.reconstruct(codes[RL], RL)) - (plain - crosscoder.reconstruct(codes[BASE], BASE))
    offsets = crosscoder.offset(RL) - crosscoder.offset(BASE)
    assert float(errors.norm()) > 0.1
    torch.testing.assert_close(lifted + errors + offsets, other, **CLOSE)


def test_with_a_shared_offset_none_is_left_between_the_models(crosscoder: Crosscoder) -> None:
    crosscoder.facts = {"objective": "both"}
    torch.testing.assert_close(crosscoder.offset(RL), crosscoder.offset(BASE))


def test_lowering_undoes_what_lifting_did_in_models_that_differ_by_one_vector(crosscoder: Crosscoder) -> None:
    """Up to the block the models are equal: lowering takes away exactly what lifting adds."""
    text = batch_of(7)[0]
    base, planted = tiny_model(), tiny_model()
    shift = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    planted.model.layers[LAYER].register_forward_hook(lambda module, args, output: output + shift)
    edit = FeatureEdit((), "patch")
    with editing(base, edit, site(crosscoder, BASE), source=SourceModel(planted, RL)):
        up = residual_after_the_block(base, text)
    with editing(planted, edit, site(crosscoder, RL), source=SourceModel(base, BASE)):
        down = residual_after_the_block(planted, text)
    torch.testing.assert_close(up - down, shift.expand(7, WIDTH), **CLOSE)
    lift = FeatureEdit(SET, "lift")
    with editing(base, lift, site(crosscoder, BASE), source=SourceModel(planted, RL)):
        lifted = residual_after_the_block(base, text)
    with editing(planted, lift, site(crosscoder, RL), source=SourceModel(base, BASE)):
        lowered = residual_after_the_block(planted, text)
    raised = lifted - residual_after_the_block(base, text)
    assert float(raised.norm()) > 0.1
    torch.testing.assert_close(lowered - residual_after_the_block(planted, text), -raised, **CLOSE)


def test_a_token_that_the_source_lacks_does_not_stop_it(crosscoder: Crosscoder) -> None:
    """An end token added to the edited model; positions before it read as ever."""
    source, longer, text = tiny_model(seed=5), deepcopy(tiny_model()), batch_of(7)[0]  # configs are shared
    longer.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    ended = torch.cat([text, torch.tensor([[VOCABULARY]])], dim=1)
    with editing(longer, FeatureEdit((), "patch"), site(crosscoder, BASE), source=SourceModel(source, RL)):
        patched = residual_after_the_block(longer, ended)
    torch.testing.assert_close(patched[:7], residual_after_the_block(source, text), **CLOSE)


@pytest.mark.parametrize("edit", [FeatureEdit(SET, "disable"), FeatureEdit(SET, "amplify", 3.0)])
def test_a_gain_multiplies_the_whole_change(model: Any, crosscoder: Crosscoder, edit: FeatureEdit) -> None:
    text = batch_of(7)[0]
    plain = residual_after_the_block(model, text)
    changes = []
    for gain in (1.0, 2.5):
        with editing(model, replace(edit, gain=gain), site(crosscoder, BASE)):
            changes.append(residual_after_the_block(model, text) - plain)
    assert float(changes[0].norm()) > 0.1
    torch.testing.assert_close(2.5 * changes[0], changes[1], **CLOSE)


class Tokens:
    """Tokenizer of number words, enough for generation."""

    pad_token_id, eos_token_id, bos_token = 0, 1, None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


PROMPTS = ["3 4 5 6 7", "8 9", "10 11 12", "13 14 15 16", "17 18 19", "20", "21 22 23 24 25 26"] * 2
SEEDS = list(range(len(PROMPTS)))


def completions(model: Any, batch_size: int) -> list[tuple[int, ...]]:
    completions = generate(model, Tokens(), PROMPTS, max_new_tokens=12, seeds=SEEDS, batch_size=batch_size)
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("kind", ["disable", "amplify", "lift", "patch", "add_vector"])
def test_completions_do_not_depend_on_the_batch(model: Any, crosscoder: Crosscoder, kind: Any) -> None:
    source = SourceModel(tiny_model(seed=5), RL) if kind in ("lift", "patch") else None
    edit = {
        "disable": FeatureEdit(SET, "disable", skip_first=1),
        "amplify": FeatureEdit(SET, "amplify", 3.0, positions="completion"),
        "lift": FeatureEdit(SET, "lift"),
        "patch": FeatureEdit((), "patch", 0.5),
        "add_vector": FeatureEdit((), "add_vector", vector=tuple(0.5 * (i % 3) for i in range(WIDTH))),
    }[kind]
    plain = completions(model, 16)
    assert len({len(ids) for ids in plain}) > 2, "rows must end at different steps, so that the batch shrinks"
    with editing(model, edit, site(crosscoder, BASE), source=source):
        one_by_one, small, large = (completions(model, size) for size in (1, 5, 16))
    assert one_by_one == small == large
    assert large != plain
    assert completions(model, 16) == plain


def test_lift_while_generating_equals_reading_the_finished_texts(model: Any, crosscoder: Crosscoder) -> None:
    source = SourceModel(tiny_model(seed=5), RL)
    edit, where = FeatureEdit(SET, "lift", positions="completion"), site(crosscoder, BASE)
    with editing(model, edit, where, source=source) as active:
        written = [
            c.token_ids for c in generate(model, Tokens(), PROMPTS, max_new_tokens=8, greedy=True, batch_size=16)
        ]
        for prompt, ids in zip(PROMPTS, written, strict=True):
            start = [int(word) for word in prompt.split()]
            active.prompt_lengths = torch.tensor([len(start)])
            logits = model(input_ids=torch.tensor([start + list(ids)]), use_cache=False).logits[0]
            assert tuple(logits[len(start) - 1 : -1].argmax(-1).tolist()) == ids


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_next"])
def test_the_source_model_stops_at_the_edited_block(family: str) -> None:
    """Unless later blocks keep a state; the completions are those of whole passes over the finished texts."""
    model, source = tiny(family), tiny(family)
    for values in source.parameters():
        values += 0.05 * torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    passes = [0, 0, 0]
    for number, block in enumerate(locate_layers(source)):
        block.register_forward_hook(lambda *_, number=number: passes.__setitem__(number, passes[number] + 1))
    where = EditSite(tiny_crosscoder(width=32), BASE, 0)
    prompts = [[5, 9, 12, 4, 7, 8, 3], [6, 5], [9, 9, 10, 11]]  # one is longer than Gemma's window
    with editing(model, FeatureEdit((), "patch", 0.5), where, source=SourceModel(source, RL)):
        written = [c.token_ids for c in generate(model, Tokens(), prompts, max_new_tokens=8, greedy=True)]
        assert (passes[-1] == 0) == (family != "qwen3_next")
        assert passes[0] >= 8
        for prompt, ids in zip(prompts, written, strict=True):
            logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
            assert tuple(logits[len(prompt) - 1 : -1].argmax(-1).tolist()) == ids
    assert written != [c.token_ids for c in generate(model, Tokens(), prompts, max_new_tokens=8, greedy=True)]


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": (1,), "kind": "amplify"}, "needs a dose"),
        ({"features": (1,), "kind": "amplify", "dose": -1.0}, "0 or more"),
        ({"features": (1,), "kind": "amplify", "dose": float("nan")}, "finite"),
        ({"features": (1,), "kind": "disable", "dose": 0.5}, "use 'amplify'"),
        ({"features": (1, 1), "kind": "disable"}, "distinct"),
        ({"features": (-1,), "kind": "disable"}, "from 0 up"),
        ({"features": (1,), "kind": "ablate"}, "kind is one of"),
        ({"features": (1,), "kind": "disable", "positions": "middle"}, "positions are one of"),
        ({"features": (1,), "kind": "disable", "phases": ()}, "phases"),
        ({"features": (1,), "kind": "disable", "vector": (1.0,)}, "no vector"),
        ({"features": (), "kind": "add_vector"}, "takes a vector"),
        ({"features": (1,), "kind": "disable", "skip_first": -1}, "skip_first"),
        ({"features": (1, 2), "kind": "amplify", "dose": 2.0, "level": (1.0,)}, "one for each of 2 features"),
        ({"features": (1,), "kind": "disable", "level": (1.0,)}, "levels are for kind 'amplify'"),
        ({"features": (1,), "kind": "amplify", "dose": 2.0, "level": (-1.0,)}, "not negative"),
        ({"features": (1,), "kind": "patch"}, "takes no features"),
        ({"features": (1,), "kind": "disable", "gain": 0.0}, "finite and positive"),
    ],
)
def test_contradictory_edits_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FeatureEdit(**arguments)


def test_misfits_are_refused(model: Any, crosscoder: Crosscoder) -> None:
    edit = FeatureEdit(SET, "disable")
    cases: list[tuple[FeatureEdit, EditSite, str]] = [
        (edit, site(crosscoder, layer=9), "blocks 0 to 2"),
        (edit, site(crosscoder, view="rl@9"), "no view"),
        (edit, site(tiny_crosscoder(width=8)), "width 8"),
        (FeatureEdit(SET, "lift"), site(crosscoder), "source model"),
        (FeatureEdit((), "add_vector", vector=(1.0, 2.0)), site(crosscoder), "16 channels"),
    ]
    for bad, where, message in cases:
        with pytest.raises(InputError, match=message), editing(model, bad, where):
            pass
    with (
        pytest.raises(InputError, match="of kind 'disable'"),
        disable(model, FeatureEdit(SET, "amplify", 2.0), site(crosscoder)),
    ):
        pass
    elsewhere = tiny_crosscoder()
    elsewhere.facts = {"site": "block7"}
    with pytest.raises(InputError, match="trained at block7, the edit's site is block1"):
        disable(model, edit, site(elsewhere, layer=1)).__enter__()
    unfinished = tiny_crosscoder()
    unfinished.threshold.fill_(float("nan"))
    with pytest.raises(InputError, match="threshold"), disable(model, edit, site(unfinished)):
        pass


def test_unclear_positions_and_compiled_models_are_refused(model: Any, crosscoder: Crosscoder) -> None:
    ids, _, _ = batch_of(6)
    with pytest.raises(RefusedError, match="dimensions"), disable(model, FeatureEdit(SET, "disable"), site(crosscoder)):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 6, 6))
    packed = {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])}
    with pytest.raises(RefusedError, match="packed"), disable(model, FeatureEdit(SET, "disable"), site(crosscoder)):
        model(input_ids=ids, **packed)
    with editing(model, FeatureEdit(SET, "disable", positions="completion"), site(crosscoder)):
        cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
        with pytest.raises(RefusedError, match="several new tokens"):
            model(input_ids=ids[:, 2:], past_key_values=cache)
    with (
        pytest.raises(RefusedError, match=r"torch\.compile"),
        disable(torch.compile(model), FeatureEdit(SET, "disable"), site(crosscoder)),
    ):
        pass


def test_no_token_beyond_the_vocabulary_is_ever_drawn(model: Any, crosscoder: Crosscoder) -> None:
    with amplify(model, FeatureEdit(SET, "amplify", 1e6), site(crosscoder)):
        assert all(0 <= token < VOCABULARY for ids in completions(model, 16) for token in ids)


@pytest.mark.parametrize(
    "edit", [FeatureEdit(SET, "disable"), FeatureEdit(SET, "amplify", 3.0, positions="completion")]
)
def test_beam_search_keeps_rows_apart(model: Any, crosscoder: Crosscoder, edit: FeatureEdit) -> None:
    """A row's beams are the same alone and in a padded batch, and not those of the unedited model."""
    ids, mask, _ = batch_of(7, 4, 5)
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with editing(model, edit, site(crosscoder)):
        together = model.generate(ids, attention_mask=mask, **how)[:, -6:]
        for row, length in enumerate((7, 4, 5)):
            alone = model.generate(ids[[row], -length:], attention_mask=mask[[row], -length:], **how)[0, -6:]
            assert together[row].tolist() == alone.tolist()
    assert together.tolist() != model.generate(ids, attention_mask=mask, **how)[:, -6:].tolist()
