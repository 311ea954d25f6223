"""Declared layout of every analysis in results.zarr; the report and other readers rely on it."""

from __future__ import annotations

from typing import Final

from rlgen_stats.schemas.declaring import MODEL_COORDS, TEST_ATTRS, TEST_VARIABLES, Layout, Variable, variables_on
from rlgen_stats.schemas.dims import DOMAIN, FEATURE, MODEL, TASK, TRAINED_RUN, VIEW

_INTERVENTION: Final = (
    variables_on(
        "direction condition",
        accuracy="float",
        effect="float",
        effect_low="float",
        effect_high="float",
        p_value="float",
        kind="str",
        dose="float",
        kl_to_base="float",
        kl_to_rl="float",
        length="float",
    )
    | variables_on(f"direction condition {TASK}", task_accuracy="float", task_effect="float")
    | variables_on("direction condition class", class_share="float")
    | variables_on(
        "direction",
        verdict="str",
        reasons="str",
        rank_p="float",
        v1="bool",
        v2="bool",
        v3="bool",
        v4="bool",
        v5="str",
        v6="bool",
        decided_by="str",
        n_prompts="int",
    )
    | variables_on(  # one row a criterion: causal/findings.py says what each number is
        "direction criterion",
        criterion_statistic="float",
        criterion_low="float",
        criterion_high="float",
        criterion_bound="float",
        criterion_p_value="float",
        criterion_n="float",
        criterion_state="str",
        criterion_detail="str",
    )
)

_RANDOM_LEVELS: Final = ("", "_random", "_random_high")
"""A number, its mean or median when chance decides, and the 95% quantile of that."""

_CONTRAST: Final = dict.fromkeys(("tail_sft", "tail_rl", "effect", "effect_low", "effect_high", "p_value"), "float")

RESULTS: Final = (
    Layout(  # simulated before the study: how often one of its size says what is true
        "claim_power", variables_on("row", claim="str", truth="str", verdict="str", power="float"), attrs=("n_worlds",)
    ),
    Layout(  # accuracy and per-prompt transitions base -> model; greedy completions
        "behaviour",
        variables_on(
            f"{MODEL} {TASK}",
            accuracy="float",
            accuracy_low="float",
            accuracy_high="float",
            sampled_accuracy="float",
            n_prompts="int",
            kept_right="int",
            forgotten="int",
            gained="int",
            kept_wrong="int",
            p_value="float",
            q_value="float",
            difference="float",
            difference_low="float",
            difference_high="float",
        ),
        MODEL_COORDS | variables_on(TASK, **{TASK: "str", DOMAIN: "str", "role": "str"}),
        TEST_ATTRS,
        optional=variables_on(f"{MODEL} {TASK}", terminated="float", answered="float"),
    ),
    Layout(  # two models on the same prompts, of any origin; differences are B minus A
        "outcome_comparison",
        variables_on(
            TASK,
            n_prompts="int",
            n_clusters="int",
            n_samples_a="int",
            n_samples_b="int",
            accuracy_a="float",
            accuracy_b="float",
            difference="float",
            difference_low="float",
            difference_high="float",
            a_better="int",
            b_better="int",
            p_value="float",
            p_holm="float",
            p_test="str",
        )
        | variables_on(
            f"{TASK} k",
            pass_a="float",
            pass_b="float",
            pass_difference="float",
            pass_difference_low="float",
            pass_difference_high="float",
        ),
        variables_on(TASK, **{TASK: "str"}) | variables_on("k", k="int"),
        ("test", "null", "unit", "family", "family_size", "alpha", "a", "b"),
        where="rlgen-stats compare-outcomes",
    ),
    Layout(  # how far each model moved from base
        "movement",
        variables_on(MODEL, activation_shift="float", weight_distance="float", kl_from_base="float"),
        MODEL_COORDS,
    ),
    Layout(  # one row a crosscoder and view
        "health",
        variables_on(f"crosscoder {VIEW}", fve="float", ce_increase="float")
        | variables_on(
            "crosscoder", l0="float", dead_fraction="float", n_features="int", healthy="bool", reasons="str"
        ),
        optional=variables_on(  # the encoded crosscoder's readout, on base and every checkpoint
            f"crosscoder {MODEL}",
            fve_model="float",
            l0_model="float",
            n_tokens_model="float",
            dfve="float",
            code_r2="float",
            artefact="float",
        )
        | variables_on("crosscoder", readout_reasons="str", readout_accepted="bool"),
    ),
    Layout(  # per pairwise crosscoder: base and a checkpoint (coordinate target), or base and itself
        "attribution",
        variables_on(
            f"crosscoder {FEATURE}", nrn_l1="float", nrn_l2="float", log_ratio="float", firing="float", alive="bool"
        )
        | variables_on(f"mas_crosscoder {VIEW} {FEATURE}", mas_l1="float", mas_l2="float"),
        optional=variables_on(f"crosscoder {FEATURE}", cluster="int", scaling_agrees="bool", cosine="float")
        | variables_on(f"mas_crosscoder {VIEW} other_view {FEATURE}", view_cosine="float"),
    ),
    Layout(  # beta and nu by view, nu relative to the feature's strongest view; the models the feature is specific to
        "latent_scaling",
        variables_on(
            f"crosscoder {VIEW} {FEATURE}",
            **{
                f"{kind}_{target}{se}": "float"
                for kind in ("beta", "nu")
                for target in ("error", "reconstruction")
                for se in ("", "_se")
            },
        )
        | variables_on(f"crosscoder {FEATURE}", feature_class="str", specific_to="str", n_active="int", n_groups="int"),
        attrs=("unit", "tau", "alpha", "nu_error_max", "nu_reconstruction_max"),
    ),
    Layout(  # matches of a crosscoder's features in dictionaries trained from other seeds
        "matching",
        variables_on(
            f"crosscoder replicate {FEATURE}",
            match="int",
            similarity="float",
            best_similarity="float",
            q_value="float",
            correlation="float",
            matched="bool",
        )
        | variables_on(f"crosscoder {FEATURE}", reappearance="float")
        | variables_on("crosscoder replicate", subspace_overlap="float", subspace_overlap_chance="float"),
        attrs=("test", "null", "unit", "by", "alpha"),
    ),
    Layout(  # claim C1: model-specific features, SFT against RL; the final models, and at equal distance from base
        "attribution_contrast",
        variables_on("comparison tau", **_CONTRAST)
        | variables_on("comparison tau dictionary", effect_each="float")
        | variables_on("comparison tau", tail_null="float")
        | variables_on(
            "comparison",
            comparable="str",
            distance_sft="float",
            distance_rl="float",
            superiority="float",
            superiority_low="float",
            superiority_high="float",
        )
        | variables_on("comparison dictionary", superiority_each="float"),
        variables_on("comparison", comparison="str"),
        ("test", "null", "unit", "seed", "alpha", "decided_by"),
        optional=variables_on("floor tau", tail_floor="float", agreed_tail_floor="float")
        # the same, counting only features that latent scaling confirms
        | variables_on("comparison tau", **{f"agreed_{name}": kind for name, kind in _CONTRAST.items()})
        | variables_on("comparison tau dictionary", agreed_effect_each="float")
        | variables_on("comparison tau", agreed_tail_null="float"),
    ),
    Layout(
        "drift",
        variables_on(
            f"{MODEL} {FEATURE}",
            **TEST_VARIABLES,
            p_max_t="float",
            d_z="float",
            effect_sd="float",
            p_minimum="float",
            q_minimum="float",
            firing_change="float",
            call="str",
        )
        | variables_on(MODEL, typical_effect="float"),
        MODEL_COORDS,
        (*TEST_ATTRS, "reference", "variable"),
        optional=variables_on(
            f"{MODEL} {FEATURE}",
            magnitude_change="float",
            from_firing="float",
            from_magnitude="float",
            wasserstein="float",
            token_distance="float",
            p_wasserstein="float",
            q_wasserstein="float",
        )
        | variables_on(f"{MODEL} threshold", n_beyond="int", fdp_upper="float")
        | variables_on(MODEL, dfve="float"),
    ),
    Layout(
        "stabilization",
        variables_on(f"{MODEL} {FEATURE}", p_value="float", effect="float")
        | variables_on(f"{TRAINED_RUN} {FEATURE}", stabilized_at="float", flag="str", total_effect="float")
        | variables_on(MODEL, share="float", share_low="float", share_high="float"),
        MODEL_COORDS | variables_on(TRAINED_RUN, trained_run="str"),
        ("test", "null", "unit", "seed", "alpha", "margin", "persist"),
        optional=variables_on(
            f"{TRAINED_RUN} {FEATURE}", p_evolving="float", trend_tau="float", trend_p="float", trend_q="float"
        )
        | variables_on(
            f"{MODEL} stratum",
            share_in_stratum="float",
            share_in_stratum_low="float",
            share_in_stratum_high="float",
        )
        | variables_on(f"replicate {MODEL} stratum", share_in_stratum_replicate="float")
        | variables_on(f"{TRAINED_RUN} stratum", n_in_stratum="int")
        | variables_on(MODEL, dfve="float")
        | variables_on(
            "stratum",  # arms: first minus second, mean time to stability as a share of training
            difference_in_stratum="float",
            difference_in_stratum_low="float",
            difference_in_stratum_high="float",
            difference_in_stratum_p="float",
        ),
    ),
    Layout(
        "set_stability",
        variables_on(
            MODEL,
            overlap="float",
            cross="float",
            noise_ceiling="float",
            final_ceiling="float",
            attainable="float",
            delta="float",
            delta_low="float",
            delta_high="float",
            chance="float",
            overlap_p="float",
            rbo="float",
            paper_overlap="float",
        )
        | variables_on(f"{MODEL} replicate", delta_replicate="float")
        | variables_on(TRAINED_RUN, verdict="str", stable_from="float", nogueira="float"),
        MODEL_COORDS | variables_on(TRAINED_RUN, trained_run="str"),
        ("test", "null", "unit", "seed", "alpha", "top_k"),
        optional=variables_on(MODEL, delta_lower="float", delta_upper="float", chance_high="float", dfve="float"),
    ),
    Layout(  # claim C2: second run less first, over all dictionaries; measures 'time' and 'turnover'
        "timing_contrast",
        variables_on("measure", difference="float", low="float", high="float", p_value="float")
        | variables_on("measure dictionary", dictionary_difference="float")
        | variables_on(f"measure {TRAINED_RUN}", value="float", value_low="float", value_high="float")
        | variables_on(
            "stratum",
            weight="float",
            stratum_difference="float",
            stratum_difference_low="float",
            stratum_difference_high="float",
            stratum_difference_p="float",
        )
        | variables_on(f"stratum {TRAINED_RUN}", stratum_time="float", n_in_stratum="float")
        | variables_on("node", training_share="float", determined="bool")  # pairs of checkpoints compared
        | variables_on(f"node {TRAINED_RUN}", checkpoint="str", paper_overlap="float"),
        variables_on("measure", measure="str") | variables_on(TRAINED_RUN, trained_run="str"),
        ("test", "null", "unit", "seed", "alpha", "top_k"),
    ),
    Layout(
        "selection",
        variables_on(
            f"{TASK} {FEATURE}",
            score="float",
            kept="bool",
            p_flip="float",
            contrast="float",
            contrast_p="float",
            p_guard="float",
            excess="float",
            excess_p="float",
        )
        | variables_on(
            TASK, n_selected_prompts="int", n_gain="int", n_loss="int", n_kept="int", estimable="str", role="str"
        )
        | variables_on(TASK, guard="str", excess_estimable="str")
        | variables_on(
            FEATURE,
            paper_selected="bool",
            p_value="float",
            q_value="float",
            rank="float",
            tier="str",
            specific_p="float",
            specific_tier="str",
            verification_specific_q="float",
            verification_effect="float",
            verification_low="float",
            verification_high="float",
            verification_p="float",
            verification_q="float",
            selected="bool",
            flag="str",
        ),
        attrs=(
            *(*TEST_ATTRS, "split_hash", "score_correlation", "shift_rank", "n_paper", "p_n1", "p_n2", "rule"),
            *(*(f"carried_{name}" for name in ("share", "low", "high", "best_high")), "n_carrying", "most_features"),
            *("no_rise_p", "accompanying_p"),
        ),
        optional=variables_on(f"{TASK} {FEATURE}", verification_task_effect="float")
        | variables_on(TASK, contrast_estimable="str", used="bool")
        | variables_on(TASK, verification_estimable="str", verification_guard="str")
        | variables_on(TASK, verification_excess_estimable="str")
        | variables_on(f"{TASK} other_task", score_correlations="float")
        # share of random half-samples of the selection prompts in which the feature is among the leading ones
        | variables_on(FEATURE, verification_score="float", stability="float", stable="bool"),
    ),
    Layout(  # beside claim C3: what tokens alone explain of the selected features, and what injecting them does
        "tokens",
        variables_on(f"explained_by {FEATURE}", explained="float", explained_low="float", explained_high="float")
        | variables_on(
            f"token_class {FEATURE}",
            odds_ratio="float",
            odds_low="float",
            odds_high="float",
            odds_p="float",
            odds_q="float",
        )
        | variables_on("token_class", n_class_tokens="int")
        | variables_on(
            FEATURE,
            injected="float",
            injected_matched="float",
            injection_p="float",
            injection_q="float",
            fires_alone="bool",
            detector="bool",
            leading="str",
        ),
        variables_on("explained_by", explained_by="str") | variables_on("token_class", token_class="str"),
        (*TEST_ATTRS, "n_tokens", "n_texts"),
    ),
    Layout(  # beside claim C3: how well raw activations, their mean shift and features tell the target from base
        "separation",
        variables_on("comparison predictor", auc="float", auc_low="float", auc_high="float", pairs_right="float")
        | variables_on(
            "comparison",
            advantage="float",
            advantage_low="float",
            advantage_high="float",
            beats_raw="bool",
            p_random="float",
            n_prompts="int",
            n_units="int",
            estimable="str",
        )
        | variables_on(MODEL, share="float", share_low="float", share_high="float", norm_ratio="float"),
        MODEL_COORDS | variables_on("comparison", comparison="str") | variables_on("predictor", predictor="str"),
        ("test", "null", "unit", "seed", "alpha", "base", "target", "split_hash", "n_features", "random_sets"),
        optional=variables_on("comparison random_set", random_auc="float") | variables_on(MODEL, n_shift="int"),
    ),
    Layout(  # what other dictionaries of the encoded crosscoder find; final models of the contrasted runs
        "replicability",
        variables_on(f"dictionary {MODEL}", dfve="float", true_cosine="float", true_correlation="float", n_drift="int")
        | variables_on(  # other: the second of two dictionaries; changes and errors over tokens, sets over prompts
            f"dictionary other {MODEL}",
            **{f"{part}_{kind}": "float" for part in ("decoded", "error") for kind in ("cosine", "correlation")},
            **{f"set_{kind}{level}": "float" for kind in ("correlation", "within") for level in _RANDOM_LEVELS},
        )
        | variables_on("dictionary", n_set="int")
        | variables_on("criterion replicate", n_matched="int", matched_share="float")  # of the first's features
        | variables_on(f"criterion replicate {MODEL}", top_shared="int", top_expected="float")
        | variables_on(
            f"criterion replicate {MODEL}", **{f"matched_energy{level}": "float" for level in _RANDOM_LEVELS}
        )
        | variables_on(MODEL, n_drift_mean="float", n_drift_low="float", n_drift_high="float"),
        MODEL_COORDS
        | {name: Variable((name,), kind) for name, kind in (("dictionary", "int"), ("other", "int"))}
        | {name: Variable((name,), "str") for name in ("criterion", "replicate")},
        ("test", "null", "unit", "seed", "alpha", "top_k", "n_features", "n_random", "close_cosine"),
    ),
    Layout(  # one row per direction ('disable' in the RL model, 'amplify' in base) and arm; all dictionaries together
        "intervention",
        _INTERVENTION,
        {"criterion": Variable(("criterion",), "str")},
        attrs=("test", "null", "unit", "seed", "alpha", "features"),
        optional=variables_on("direction dictionary", dictionary_effect="float"),
    ),
    Layout(  # share of the full patch's effect that features copied from the other model carry; lift and lower
        "mediated_share",
        variables_on("direction", patch_effect="float", patch_low="float", patch_high="float")
        | variables_on(
            "direction point",
            effect="float",
            share="float",
            share_low="float",
            share_high="float",
            above_random="float",  # the same, less the mean of the random sets; NaN without comparable ones
            above_low="float",
            above_high="float",
        )
        | variables_on("direction dictionary point", dictionary_share="float", norm_ratio="float")
        | variables_on("direction dictionary point random", random_share="float", random_norm="float")
        | variables_on("dictionary point", n_features="int"),
        variables_on("point", point="str"),  # set, top-K, all
        attrs=("test", "null", "unit", "alpha", "ranking"),
        # nearest in norm, rescaled to the set's, or empty; without it the sets are nearest, whatever their norms
        optional=variables_on("direction dictionary point", random_sets="str"),
    ),
    Layout(  # balance of the matched random sets against the selected set, one row per covariate
        "control_balance",
        variables_on(
            "covariate", set_mean="float", control_mean="float", standardized_difference="float", balanced="bool"
        ),
    ),
)
