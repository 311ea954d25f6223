"""Completions sampled elsewhere, held against a study's prompts, number of samples, tokenizer and sampling settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rlgen_stats.schemas.dims import GREEDY, PROMPT
from rlgen_stats.schemas.errors import InputError
from rlgen_stats.schemas.seeds import content_hash
from rlgen_stats.schemas.study import GenerationSpec
from rlgen_stats.stores.prompts import TEXT
from rlgen_stats.toolkit.exchange.sampled_files import SETTINGS, Sampled
from rlgen_stats.toolkit.extraction.generation import Completion
from rlgen_stats.toolkit.extraction.imported import StandIn
from rlgen_stats.toolkit.extraction.stop_strings import cut_at_stop


def check_settings(
    chosen: Mapping[tuple[str, int], Sampled],
    declared: Mapping[str, float | None],
    generation: GenerationSpec,
    limits: Mapping[str, int],
) -> dict[str, float]:
    """Sampling settings of completions, recorded or declared, if they are the study's.

    Parameters
    ----------
    chosen
        (prompt, sample) -> completion.
    declared
        temperature, top_p and max_new_tokens that the files do not record.
    generation
        The study's settings.
    limits
        Prompt -> length limit of its task's completions.

    Raises
    ------
    InputError
        If one is neither declared nor recorded, or is another than the study's.
    """
    settings: dict[str, float] = {}
    unknown: dict[str, float] = {}
    for name in SETTINGS:
        for (prompt, _), one in chosen.items():
            if one.sample == GREEDY and name != "max_new_tokens":
                continue
            expected = limits[prompt] if name == "max_new_tokens" else getattr(generation, name)
            said = [value for value in (getattr(one, name), declared.get(name)) if value is not None]
            if any(value != expected for value in said):
                other = next(value for value in said if value != expected)
                raise InputError(
                    f"prompt {prompt!r} was completed with {name} {other:g}, expected {expected:g}, as of the study's "
                    "other models; sample it so, or change the study."
                )
            (settings if said else unknown)[name] = float(expected)
    if unknown:
        options = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in unknown.items())
        raise InputError(
            f"the files do not say with which {' and '.join(unknown)} they were sampled; expected what the study's "
            f"other models are sampled with: declare it, if it is so, with {options}."
        )
    return settings


def match_prompts(
    completions: Sequence[Sampled], prompts: pd.DataFrame, readings: Sequence[Mapping[str, str]] = ()
) -> list[str]:
    """Study's id of the prompt of each completion: the file's id where it is one, else that of the prompt's text.

    Parameters
    ----------
    completions
        As read.
    prompts
        The study's prompts.
    readings
        Further forms of the prompts' texts that are accepted, each id -> text: rendered, or without special tokens.

    Raises
    ------
    InputError
        If a prompt is none of the study's or has another text there, or one of the study's is missing.
    """
    texts = dict(zip(prompts[PROMPT], prompts[TEXT], strict=True))
    ids: dict[str, list[str]] = {}
    for form in (texts, *readings):
        for prompt, text in form.items():
            ids.setdefault(text, []).append(prompt)
    matched, extra = [], []
    for one in completions:
        text = one.prompt_text if one.prompt_text is not None else one.prompt
        found = list(dict.fromkeys(ids.get(text or "", ())))
        if one.prompt is not None and one.prompt in texts:
            if one.prompt_text is not None and one.prompt not in found:
                raise InputError(
                    f"prompt {one.prompt!r} had another text where it was sampled: {_named(one.prompt_text)}, here it "
                    f"is {_named(texts[one.prompt])}; expected completions of the study's prompts."
                )
            found = [one.prompt]
        if len(found) > 1:
            raise InputError(
                f"the prompts {', '.join(found[:3])} have one text, and the files name no id of them; write prompt_id."
            )
        matched.append(found[0] if found else "")
        if not found:
            extra.append(one.prompt if one.prompt is not None else _start(text or ""))
    if extra:
        raise InputError(
            f"{len(set(extra))} prompt(s) of the files are none of the study's, e.g. {extra[0]!r}, whose ids look like "
            f"{prompts[PROMPT].iloc[0]!r}; expected the study's prompts and no others: drop these rows, or write "
            "prompt_id."
        )
    missing = sorted(set(texts) - set(matched))
    if missing:
        raise InputError(
            f"{len(missing)} of the study's {len(texts)} prompts have no completion in the files, e.g. {missing[0]!r}; "
            "expected all of them: sample the rest, or take them out of the prompt table."
        )
    return matched


def _start(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"


def _named(text: str) -> str:
    return f"{_start(text)!r} (hash {content_hash(text)[:12]})"


def complete_set(
    completions: Sequence[Sampled], matched: Sequence[str], prompts: pd.DataFrame, *, n_samples: int, stand_in: StandIn
) -> dict[tuple[str, int], Sampled]:
    """(prompt, sample) -> completion: one greedy and ``n_samples`` sampled ones of every prompt.

    Raises
    ------
    InputError
        If a completion is there twice, or too few or too many are.
    """
    keys = [(prompt, one.sample) for prompt, one in zip(matched, completions, strict=True)]
    repeated = [key for key, n in Counter(keys).items() if n > 1]
    if repeated:
        prompt, sample = repeated[0]
        what = "greedy completion" if sample == GREEDY else f"sample {sample}"
        raise InputError(
            f"prompt {prompt!r} has its {what} twice ({len(repeated)} such in the files); number samples from 0."
        )
    by_prompt: dict[str, dict[int, Sampled]] = {prompt: {} for prompt in prompts[PROMPT]}
    for prompt, one in zip(matched, completions, strict=True):
        by_prompt[prompt][int(one.sample or 0)] = one
    for prompt, found in by_prompt.items():
        if stand_in == "greedy" and 0 in found:
            found.setdefault(GREEDY, found[0])
        elif stand_in == "samples" and GREEDY in found:
            found |= {sample: found[GREEDY] for sample in range(n_samples) if sample not in found}
        if sorted(found) != list(range(GREEDY, n_samples)):
            raise _wrong_number(prompt, found, n_samples)
    return {(prompt, sample): one for prompt, found in by_prompt.items() for sample, one in found.items()}


def _wrong_number(prompt: str, found: Mapping[int, Sampled], n_samples: int) -> InputError:
    n_greedy = int(GREEDY in found)
    n_sampled = len(found) - n_greedy
    advice = "sample them alike, or set generation.n_samples to their number"
    if not n_greedy:
        advice = "name files of greedy completions with --greedy, or let the first sample stand in (--no-greedy)"
    elif not n_samples:
        advice = "leave its samples out, or set generation.n_samples to one number for all checkpoints"
    elif not n_sampled:
        advice = "sample them, or let the greedy one stand in (--no-samples)"
    return InputError(
        f"prompt {prompt!r} has {n_greedy} greedy and {n_sampled} sampled completions, expected 1 and {n_samples} "
        f"(generation.n_samples), numbered from 0; {advice}."
    )


def as_completion(
    one: Sampled, tokenizer: Any, *, prompt: str, limit: int, stop: Sequence[str] = (), engine: str = ""
) -> Completion:
    """A completion as if sampled here: text and tokens, one from the other where a file has one only.

    Parameters
    ----------
    one
        As read.
    tokenizer
        Of the study.
    prompt
        Its id, for messages.
    limit
        Length limit, in tokens.
    stop
        Texts that end a completion.
    engine
        What sampled it.

    Raises
    ------
    InputError
        If the tokens are not those of the text in this tokenizer, or more than the limit, or the text goes on after
        what should have ended it.

    Notes
    -----
    Where a file does not say whether the model ended, it did if the last token is the end token or fewer than ``limit``
    tokens are there. A text without tokens is tokenised here: where it could be written with other tokens, these are
    not those that were sampled.
    """
    if one.token_ids is None and one.text is None:  # a verdict alone
        return Completion((), "", True)
    if one.token_ids is None:
        ids, read, stopped = tuple(tokenizer(one.text, add_special_tokens=False)["input_ids"]), str(one.text), False
    else:
        ids, read, stopped = _up_to_stop(_known(one.token_ids, tokenizer, prompt), tokenizer, stop)
    text = read if one.text is None else one.text
    passed = next((string for string in stop if string in text), None)
    if passed is not None:
        raise InputError(
            f"a completion of prompt {prompt!r} goes on after the stop string {passed!r} of its task; sample with it, "
            "or cut the text there."
        )
    end = tokenizer.eos_token_id
    if one.token_ids is None:
        terminated = len(ids) < limit if one.terminated is None else one.terminated
        if terminated and end is not None and not stop and engine != "lm-eval":  # else a stop string may have ended it
            ids += (end,)
        return Completion(ids, text, terminated)
    if "".join(read.split()) != "".join(text.split()):
        raise _other_tokenizer(prompt, f"they read {_start(read)!r}, the file says {_start(text)!r}")
    if len(ids) > limit:
        raise InputError(
            f"a completion of prompt {prompt!r} has {len(ids)} tokens, more than the limit of {limit} "
            "(max_new_tokens); expected the same limit for all models."
        )
    ended = stopped or (bool(ids) and ids[-1] == end) or len(ids) < limit
    return Completion(ids, text, ended if one.terminated is None else one.terminated)


def _up_to_stop(ids: Sequence[int], tokenizer: Any, stop: Sequence[str]) -> tuple[tuple[int, ...], str, bool]:
    """Tokens, their text, and whether a stop string ended them: engines cut it from the text and leave its tokens."""
    kept, text, stopped = cut_at_stop(tokenizer, ids, stop)
    if stopped and cut_at_stop(tokenizer, ids[:-1], stop)[2]:  # it did not end there
        return tuple(ids), cut_at_stop(tokenizer, ids, ())[1], False
    return tuple(kept), text, stopped


def _known(ids: tuple[int, ...], tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Tokens, if the tokenizer has them."""
    unknown = next((token for token in ids if not 0 <= token < len(tokenizer)), None)
    if unknown is not None:
        raise _other_tokenizer(prompt, f"token {unknown} is none of its {len(tokenizer)}")
    return ids


def _other_tokenizer(prompt: str, difference: str) -> InputError:
    return InputError(
        f"the tokens of a completion of prompt {prompt!r} are not of the study's tokenizer: {difference}; expected "
        "completions of a model with this tokenizer, or texts without tokens."
    )
