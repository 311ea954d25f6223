import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, PreTrainedTokenizerFast

from rlgen_stats.schemas.errors import InputError, ModelError
from rlgen_stats.toolkit.counter_random import counter_bits
from rlgen_stats.toolkit.extraction import generate
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.stop_strings import StopStrings
from rlgen_stats.toolkit.extraction.token_draws import IN_CACHE, draw_tokens, gumbel_noise
from tests.extraction.bpe import bpe_model, chatml_tokenizer
from tests.extraction.conftest import ARCHITECTURES, PROMPTS, tiny_model
from tests.oracles.slow_generation import GAMMA, completed, drawn, gumbel, key, mix


def sampled(model: Any, tokenizer: Any, prompts: Any, seeds: Any, **how: Any) -> list[Completion]:
    settings = {"max_new_tokens": 8, "batch_size": 16} | how
    return generate(model, tokenizer, prompts, seeds=seeds, **settings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_the_models_own_generate(architecture: str, tokenizer: Any) -> None:
    model = tiny_model(architecture, seed=3)
    ours = generate(model, tokenizer, PROMPTS, max_new_tokens=10, greedy=True, batch_size=5)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10)
        expected = theirs[0, ids.shape[1] :].tolist()
        assert list(completion.token_ids) == expected
        assert completion.terminated == (expected[-1] == 1)
    assert len({completion.token_ids for completion in ours}) > 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_refilled_batches_equal_whole_forward_passes(architecture: str, tokenizer: Any) -> None:
    model = tiny_model(architecture, seed=1)
    limits = [(2, 9, 4, 12)[row % 4] for row in range(12)]
    how = {"temperature": 0.9, "top_p": 0.8}
    rows = sampled(model, tokenizer, PROMPTS, range(12), max_new_tokens=limits, batch_size=3, **how)
    for seed, (prompt, limit, row) in enumerate(zip(PROMPTS, limits, rows, strict=True)):
        ids = tokenizer(prompt)["input_ids"]
        assert row.token_ids == completed(model, ids, limit, ends={1}, seed=seed, **how)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2"])
def test_a_rows_draws_depend_on_its_seed_alone(architecture: str, tokenizer: Any) -> None:
    model = tiny_model(architecture, seed=1)
    prompts, seeds = list(PROMPTS) * 3, [100 + i for i in range(3 * len(PROMPTS))]
    one = sampled(model, tokenizer, prompts, seeds, batch_size=1)
    many = sampled(model, tokenizer, prompts, seeds, batch_size=16)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = sampled(model, tokenizer, [prompts[i] for i in order], [seeds[i] for i in order], batch_size=7)
    assert one == many
    assert [one[i] for i in order] == shuffled
    assert {completion.terminated for completion in one} == {True, False}
    other = sampled(model, tokenizer, prompts, [seed + 1 for seed in seeds], batch_size=16)
    assert other != many


def test_ends_are_where_the_end_token_is(model: Any, tokenizer: Any) -> None:
    rows = sampled(model, tokenizer, list(PROMPTS) * 10, list(range(120)), max_new_tokens=12)
    assert any(row.terminated for row in rows)
    for row in rows:
        assert row.terminated == (row.token_ids[-1] == 1)
        assert 1 not in row.token_ids[:-1]
        assert len(row.token_ids) == 12 or row.terminated
        assert row.text == tokenizer.decode(row.token_ids, skip_special_tokens=True)


def cut_before(row: Completion, tokenizer: Any, stop: tuple[str, ...]) -> tuple[str, bool]:
    """A slow way: the text as it is after every token."""
    for n in range(1, len(row.token_ids) + 1):
        text = tokenizer.decode(row.token_ids[:n], skip_special_tokens=True)
        found = [text.index(string) for string in stop if string in text]
        if found:
            return text[: min(found)], True
    return row.text, row.terminated


def test_stop_strings_cut_each_row_as_its_text_says_whatever_its_batch(tokenizer: Any) -> None:
    model = tiny_model(seed=1)
    prompts, seeds = list(PROMPTS) * 3, list(range(3 * len(PROMPTS)))
    free = sampled(model, tokenizer, prompts, seeds, max_new_tokens=20)
    words = Counter(word for row in free for word in row.text.split())
    pairs = Counter(pair for row in free for pair in zip(row.text.split(), row.text.split()[1:], strict=False))
    common, pair = words.most_common(1)[0][0], " ".join(pairs.most_common(1)[0][0])
    stop = [((), (common,), (pair, "no such text"))[row % 3] for row in range(len(prompts))]
    one = sampled(model, tokenizer, prompts, seeds, max_new_tokens=20, stop=stop, batch_size=1)
    many = sampled(model, tokenizer, prompts, seeds, max_new_tokens=20, stop=stop, batch_size=16)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = generate(
        model,
        tokenizer,
        [prompts[i] for i in order],
        seeds=[seeds[i] for i in order],
        stop=[stop[i] for i in order],
        max_new_tokens=20,
        batch_size=7,
    )
    assert one == many
    assert [one[i] for i in order] == shuffled
    for before, after, strings in zip(free, one, stop, strict=True):
        assert (after.text, after.terminated) == cut_before(before, tokenizer, strings)
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        if after.text != before.text and len(after.token_ids) > 1:  # no token beyond the text is kept
            assert not tokenizer.decode(after.token_ids[:-1], skip_special_tokens=True).startswith(after.text)
    assert sum(a.text != b.text for a, b in zip(free, one, strict=True)) > 8
    assert one[0] == free[0]


def test_a_stop_string_may_begin_inside_a_token() -> None:
    """Tokens of a byte-level BPE join a full stop and line feeds, and a character may be several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    raw.train_from_iterator(["It is 7.\n\nQ: 7.\n\nQ: so 7.\n\n"] * 5, trainer)
    stopping = StopStrings(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>"))
    ids = raw.encode("It is \u22127.\n\nQ: 1").ids
    text_of_first = [raw.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert text_of_first[-1] == "It is \u22127.\n\nQ: 1"
    assert any(token not in ("\n", ".") and ".\n" in token for token in map(raw.decode, [[i] for i in ids]))
    for stop, kept in ((("\n\nQ:",), "It is \u22127."), (("\u2212",), "It is "), (("Q", "7"), "It is \u2212")):
        found = [n for n in range(1, len(ids) + 1) if stopping.found(ids[:n], stop)]
        assert found[0] == next(n for n, text in enumerate(text_of_first) if any(s in text for s in stop))
        tokens, text, ended = stopping.cut(ids, stop)
        assert (text, ended) == (kept, True)
        assert raw.decode(tokens).startswith(kept)
        assert not raw.decode(tokens[:-1]).startswith(kept)
    assert stopping.cut(ids, ("zebra",)) == (ids, text_of_first[-1], False)
    assert not stopping.found(ids, ())


def test_rows_have_length_limits_of_their_own(model: Any, tokenizer: Any) -> None:
    limits = [1 + row % 5 for row in range(len(PROMPTS))]
    seeds = list(range(len(PROMPTS)))
    free = sampled(model, tokenizer, list(PROMPTS), seeds, max_new_tokens=8)
    rows = sampled(model, tokenizer, list(PROMPTS), seeds, max_new_tokens=limits)
    assert [row.token_ids for row in rows] == [row.token_ids[:n] for row, n in zip(free, limits, strict=True)]
    assert [row.terminated for row in rows] == [row.token_ids[-1] == 1 for row in rows]


def test_a_generation_configs_own_end_tokens_stop_too(tokenizer: Any) -> None:
    model = tiny_model(seed=2)
    free = sampled(model, tokenizer, list(PROMPTS), range(12))
    stop = Counter(row.token_ids[0] for row in free).most_common(1)[0][0]
    model.generation_config.eos_token_id = [1, stop]
    rows = sampled(model, tokenizer, list(PROMPTS), range(12))
    for before, after in zip(free, rows, strict=True):
        ids = list(before.token_ids)
        cut = next((i for i, token in enumerate(ids) if token in (1, stop)), len(ids) - 1)
        assert list(after.token_ids) == ids[: cut + 1]
        assert after.terminated == (ids[cut] in (1, stop))


def test_first_tokens_follow_the_softmax_at_the_temperature(model: Any, tokenizer: Any) -> None:
    n, temperature = 4000, 1.7
    rows = sampled(
        model, tokenizer, [PROMPTS[0]] * n, list(range(n)), max_new_tokens=1, temperature=temperature, batch_size=1000
    )
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    expected = torch.softmax(model(ids).logits[0, -1].double() / temperature, -1).numpy() * n
    observed = np.bincount([row.token_ids[0] for row in rows], minlength=len(expected))
    assert goodness_of_fit(observed, expected) > 1e-3
    plain = torch.softmax(model(ids).logits[0, -1].double(), -1).numpy() * n
    assert goodness_of_fit(observed, plain) < 1e-6  # the same counts refute temperature 1


def goodness_of_fit(observed: Any, expected: Any) -> float:
    """Chi-square p-value; categories too rare for the approximation are pooled with the most common one."""
    rare = expected < 5
    rare[expected.argmax()] = True
    pooled = [np.append(counts[~rare], counts[rare].sum()) for counts in (observed, expected)]
    return float(stats.chisquare(*pooled).pvalue)


def keys_of(n: int, step: int = 0) -> Any:
    return counter_bits(np.arange(n, dtype=np.uint64), np.full(n, step, dtype=np.uint64))


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_mass() -> None:
    probabilities = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = torch.tensor(np.log(probabilities)).float().expand(2000, -1)
    drawn = draw_tokens(logits, keys_of(2000), temperature=1.0, top_p=0.6)
    counts = np.bincount(drawn.numpy(), minlength=5)
    assert set(np.flatnonzero(counts)) == {1, 3}
    assert stats.binomtest(int(counts[1]), 2000, 0.4 / 0.7).pvalue > 1e-3
    assert set(draw_tokens(logits, keys_of(2000), temperature=1.0, top_p=1.0).tolist()) == set(range(5))


@pytest.mark.parametrize("n_kept", [1, 255, 256, 257, 800])
def test_nuclei_larger_than_the_candidates_are_exact(n_kept: int) -> None:
    """255 tokens are seen to be all from 256 candidates; of 256 that is not known yet."""
    draw = np.random.default_rng(n_kept)
    logits = np.sort(draw.normal(size=1000))[::-1].astype(np.float32)
    mass = np.exp(logits.astype(np.float64)).cumsum() / np.exp(logits.astype(np.float64)).sum()
    top_p = float(mass[:n_kept].mean() if n_kept == 1 else mass[n_kept - 2 : n_kept].mean())
    order = draw.permutation(1000)
    shuffled, kept = logits[order], np.flatnonzero(order < n_kept).tolist()
    n = 300
    tokens = draw_tokens(torch.tensor(shuffled).expand(n, -1), keys_of(n), temperature=1.0, top_p=top_p).tolist()
    assert tokens == [drawn(shuffled, key(seed, 0), kept=kept) for seed in range(n)]
    assert (len(set(tokens)) > 1) == (n_kept > 1)


def test_tokens_as_likely_as_the_last_of_a_nucleus_belong_to_it() -> None:
    """Half types have few values, and where a sort puts equal ones is chance."""
    logits = torch.zeros(3000, 300)
    logits[:, 7] = 3.0
    drawn_tokens = draw_tokens(logits, keys_of(3000), temperature=1.0, top_p=0.1)
    assert set(drawn_tokens.tolist()) == set(range(300))


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((1000, 50), -torch.inf)
    logits[:, 20], logits[:, 30] = 0.0, 1.0
    for top_p in (1.0, 0.999):
        assert set(draw_tokens(logits, keys_of(1000), temperature=0.5, top_p=top_p).tolist()) == {20, 30}
    logits[:, 20] = -torch.inf
    assert set(draw_tokens(logits, keys_of(1000), temperature=0.5, top_p=1.0).tolist()) == {30}


def test_noise_is_gumbel_and_independent_over_seeds_steps_and_tokens() -> None:
    tokens = torch.arange(50)
    noise = np.stack([gumbel_noise(torch.from_numpy(keys_of(60, step).view(np.int64)), tokens) for step in range(20)])
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.995 * noise.size
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:]), (noise[..., :-1], noise[..., 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("width", [61, IN_CACHE // 2 + 1])  # many rows at once, the last block shorter; one row at once
def test_a_row_draws_what_it_draws_alone(width: int) -> None:
    n = 3 * max(1, IN_CACHE // width) - 1
    logits = torch.randn((n, width), generator=torch.Generator().manual_seed(0))
    keys = keys_of(n)
    alone = [draw_tokens(logits[i : i + 1], keys[i : i + 1], temperature=1.0, top_p=1.0) for i in range(n)]
    torch.testing.assert_close(draw_tokens(logits, keys, temperature=1.0, top_p=1.0), torch.cat(alone))


def test_noise_is_pinned() -> None:
    """SplitMix64 in Python integers, as published; a change of the draws changes every study."""
    assert mix(GAMMA) == 0xE220A8397B1DCDAF  # first output of splitmix64 from state 0
    tokens = torch.tensor([0, 1, 150_000])
    for seed, step in ((0, 0), (12345, 7), (2**64 - 1, 100)):
        bits = counter_bits(np.array([seed], dtype=np.uint64), np.array([step], dtype=np.uint64))
        assert int(bits[0]) == key(seed, step)
        noise = gumbel_noise(torch.from_numpy(bits.view(np.int64)), tokens)[0]
        slow = [gumbel(key(seed, step), int(token)) for token in tokens]
        np.testing.assert_allclose(noise.numpy(), slow, rtol=1e-5, atol=1e-6)


def passes(model: Any) -> tuple[list[tuple[int, int]], Any]:
    """[rows, tokens] of every forward pass from now on, and a handle that ends the record."""
    shapes: list[tuple[int, int]] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    return shapes, model.register_forward_pre_hook(record, with_kwargs=True)


def test_rows_join_the_batch_as_others_leave(tokenizer: Any) -> None:
    """One row of twenty tokens beside many of one: static batches of four would take 20 + 8 passes and hold one row."""
    model = tiny_model(seed=1)
    limits = [20] + [1 + row % 3 for row in range(1, 12)]
    shapes, handle = passes(model)
    rows = sampled(model, tokenizer, PROMPTS, range(12), max_new_tokens=limits, batch_size=4)
    handle.remove()
    assert rows == [
        sampled(model, tokenizer, [prompt], [seed], max_new_tokens=limit)[0]
        for seed, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    decoding = [n for n, length in shapes if length == 1]
    assert len(decoding) <= 20
    assert max(n for n, _ in shapes) == 4
    assert sum(n for n, length in shapes if length > 1) == 12


def test_rows_of_one_prompt_read_it_once(tokenizer: Any) -> None:
    model = tiny_model(seed=1)
    prompts = [PROMPTS[row % 3] for row in range(30)]  # ten rows each, in batches of four
    greedy = [row < 3 for row in range(30)]
    shapes, handle = passes(model)
    rows = sampled(model, tokenizer, prompts, range(30), greedy=greedy, batch_size=4)
    handle.remove()
    assert sum(n for n, length in shapes if length > 1) == 3
    assert max(n for n, _ in shapes) <= 4
    assert rows[:3] == generate(model, tokenizer, prompts[:3], max_new_tokens=8, greedy=True)
    assert rows[3:] == sampled(model, tokenizer, prompts[3:], range(3, 30))


def test_finished_rows_do_not_run_out_of_positions(tokenizer: Any) -> None:
    """A row that ends at the model's last position stays in the batch with seven that go on."""
    for architecture in ("gpt2", "llama"):
        model = tiny_model(architecture, seed=1)
        long, short = " ".join(["so"] * 120), "what is 3"
        model.lm_head.weight.data[1] *= -5.0  # hardly any ends by itself
        rows = sampled(model, tokenizer, [long] + [short] * 7, range(8), max_new_tokens=[8] + [60] * 7)
        assert rows[7] == sampled(model, tokenizer, [short], [7], max_new_tokens=60)[0]


class KeepsToItself(DynamicCache):  # type: ignore[misc]
    """A kind of cache that nobody has said how to join."""


def test_rows_do_not_join_a_cache_of_an_unknown_kind(tokenizer: Any) -> None:
    model = tiny_model(seed=1)
    prompts, seeds = list(PROMPTS) * 2, range(24)
    expected = sampled(model, tokenizer, prompts, seeds, batch_size=5)

    def other_cache(module: Any, args: Any, kwargs: Any) -> Any:
        if kwargs["past_key_values"] is None:
            kwargs["past_key_values"] = KeepsToItself(config=module.config)
        return args, kwargs

    model.register_forward_pre_hook(other_cache, with_kwargs=True)
    shapes, _ = passes(model)
    assert sampled(model, tokenizer, prompts, seeds, batch_size=5) == expected
    assert max(n for n, _ in shapes) == 5
    for before, after in itertools.pairwise(shapes):
        assert after[0] <= before[0] or max(before[1], after[1]) > 1


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_nan_are_an_error_not_token_zero(tokenizer: Any, greedy: bool) -> None:
    broken = tiny_model()
    broken.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ModelError, match=r"rl@1 greedy: the model's logits are NaN"):
        generate(
            broken, tokenizer, ["three plus"], max_new_tokens=3, greedy=greedy, seeds=[1], description="rl@1 greedy"
        )


def test_bad_settings_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="one seed per row"):
        generate(model, tokenizer, ["what"], max_new_tokens=2)
    with pytest.raises(InputError, match="1 prompts, 2 seeds"):
        generate(model, tokenizer, ["what"], max_new_tokens=2, seeds=[1, 2])
    with pytest.raises(InputError, match="between 0 and"):
        generate(model, tokenizer, ["what"], max_new_tokens=2, seeds=[-1])
    with pytest.raises(InputError, match="temperature must be positive"):
        generate(model, tokenizer, ["what"], max_new_tokens=2, seeds=[1], temperature=0.0)
    with pytest.raises(InputError, match="must be 1 or more"):
        generate(model, tokenizer, ["what"], max_new_tokens=0, greedy=True)
    with pytest.raises(InputError, match="has no tokens"):
        generate(model, tokenizer, ["  "], max_new_tokens=2, greedy=True)
    with pytest.raises(InputError, match="with its end token"):
        generate(model, tokenizer, ["what <eos>"], max_new_tokens=2, greedy=True)
    with pytest.raises(InputError, match=r"1 tokens and 128 may follow, but the model's context is 128"):
        generate(model, tokenizer, ["what"], max_new_tokens=128, greedy=True)
    with pytest.raises(InputError, match="one max_new_tokens per row is needed: 1 prompts, 2 given"):
        generate(model, tokenizer, ["what"], max_new_tokens=[2, 3], greedy=True)
    for stop in (["so"], [["so", ""]]):
        with pytest.raises(InputError, match="stop strings are one list a row, none of them empty"):
            generate(model, tokenizer, ["what"], max_new_tokens=2, greedy=True, stop=stop)
    with pytest.raises(InputError, match="one greedy per row is needed: 1 prompts, 2 given"):
        generate(model, tokenizer, ["what"], max_new_tokens=2, greedy=[True, True])
    with pytest.raises(InputError, match="sampling needs one seed per row"):
        generate(model, tokenizer, ["what", "is"], max_new_tokens=2, greedy=[True, False])
    assert generate(model, tokenizer, [], max_new_tokens=2, greedy=True) == []


def test_a_stop_string_may_be_a_special_token() -> None:
    tokenizer = chatml_tokenizer()
    model, end = bpe_model(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    raise_end = torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)) * 8.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + raise_end)  # else it is too rare to see
    prompts, seeds = ["What is 2 + 3?"] * 8, range(8)
    free = sampled(model, tokenizer, prompts, seeds, max_new_tokens=20)
    stop = [["<|im_end|>"], []] * 4
    rows = sampled(model, tokenizer, prompts, seeds, max_new_tokens=20, stop=stop)
    assert rows[1::2] == free[1::2]
    assert any(end in row.token_ids[:-1] for row in free[::2])
    for before, after in zip(free[::2], rows[::2], strict=True):
        ids = before.token_ids
        assert after.token_ids == (ids[: ids.index(end) + 1] if end in ids else ids)
        assert after.terminated == (before.terminated or end in ids)
        assert after.text == tokenizer.decode(after.token_ids, skip_special_tokens=True)
