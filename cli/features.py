"""features: model specificity, contexts and promoted tokens of a study's features, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from rlgen_stats.cli.console import echo, handle_errors, heading, json_option, print_json, study_argument

if TYPE_CHECKING:
    from rlgen_stats.toolkit.reporting import FeatureCard

MAX_TEXT: Final = 110
"""Characters of a context on a terminal line."""


@click.command()
@study_argument
@click.argument("features", type=int, nargs=-1, metavar="[FEATURE]...")
@click.option("--contexts", "n", type=click.IntRange(min=0), default=3, show_default=True, help="Texts per model.")
@json_option
@handle_errors
def features(study: str, features: tuple[int, ...], n: int, as_json: bool) -> None:
    """Show features: their model specificity, the texts on which each model activates them, their promoted tokens.

    Without a number: the selected features, best first.

    \b
    Examples:  rlgen-stats features runs/demo
               rlgen-stats features runs/demo 12 407 --contexts 5
    """  # noqa: D301 - click needs the backspace itself
    from dataclasses import asdict

    from rlgen_stats.toolkit.reporting import feature_cards, load_results, read_study_data
    from rlgen_stats.toolkit.study import open_for_run

    opened = open_for_run(study, exact=False)
    results = load_results(opened.folder)
    data = read_study_data(opened.folder, opened.spec)
    cards = feature_cards(opened.folder, opened.spec, results, data, list(features) if features else None)
    if as_json:
        print_json([asdict(card) for card in cards])
        return
    if not cards:
        echo("No feature is selected here (yet); name some: rlgen-stats features STUDY 12 407")
    for card in cards:
        print_feature(card, n)


def print_feature(card: FeatureCard, n: int) -> None:
    """One feature: where it comes from, its means, promoted tokens, and ``n`` contexts a model."""
    heading(f"feature {card.feature}")
    for sentence in card.origin:
        echo(f"  {sentence}")
    if card.means:
        echo("  mean    " + "   ".join(f"{model} {mean:.3g}" for model, mean in card.means.items()))
    for model, tokens in card.tokens.items():
        echo(f"  raises  {model}: " + " · ".join(repr(token)[1:-1] for token in tokens))
    for model, contexts in card.contexts.items():
        for context in contexts[:n]:
            before, after = (repr(text)[1:-1] for text in (context.before, context.after))
            room = MAX_TEXT - len(context.peak)
            echo(
                f"  {model:<10} {context.activation:8.3g}  {before[-room * 2 // 3 :]}"
                f"⟦{context.peak}⟧{after[: room // 3]}"
            )
    if not card.contexts:
        echo("  It fires nowhere, or contexts were not collected (summaries.contexts).")


COMMANDS = {"features": features}
