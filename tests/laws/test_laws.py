"""Every law holds on the package, and every law rejects each of the broken twins listed for it."""

import inspect

import pytest
import torch

from rlhf import functional as F
from tests.laws import label_laws, label_twins, laws, twins, weak_laws, weak_twins

CASES = {
    laws.whitened_advantages_have_mean_0_and_variance_1: [
        ("masked_whiten", twins.whiten_inverted_flag),
        ("masked_whiten", twins.whiten_ignores_mask),
        ("masked_whiten", twins.whiten_unbiased),
    ],
    laws.uncentred_whitening_keeps_the_mean: [
        ("masked_whiten", twins.whiten_inverted_flag),
        ("masked_whiten", twins.whiten_ignores_mask),
        ("masked_whiten", twins.whiten_unbiased),
        ("masked_whiten", twins.whiten_only_divides),
    ],
    laws.lambda_1_is_return_minus_value: [
        ("gae", twins.gae_ignores_mask),
        ("gae", twins.gae_bootstraps_after_the_end),
        ("gae", twins.gae_flips_the_next_value),
        ("gae", twins.gae_forgets_gamma_in_the_trace),
    ],
    laws.lambda_0_is_the_one_step_temporal_difference: [
        ("gae", twins.gae_ignores_mask),
        ("gae", twins.gae_bootstraps_after_the_end),
        ("gae", twins.gae_flips_the_next_value),
        ("gae", twins.gae_forgets_lambda),
        ("gae", twins.gae_swaps_gamma_and_lambda),
    ],
    laws.exact_values_give_no_advantage: [
        ("gae", twins.gae_ignores_mask),
        ("gae", twins.gae_bootstraps_after_the_end),
        ("gae", twins.gae_flips_the_next_value),
        ("gae", twins.gae_swaps_gamma_and_lambda),
    ],
    laws.rewards_sum_to_score_minus_penalty: [
        ("shaped_rewards", twins.rewards_flipped_penalty),
        ("shaped_rewards", twins.rewards_penalise_padding),
        ("shaped_rewards", twins.rewards_on_every_token),
        ("kl_estimate", twins.kl_swapped),
    ],
    laws.without_drift_only_the_last_token_is_rewarded: [
        ("shaped_rewards", twins.rewards_length_for_index),
        ("shaped_rewards", twins.rewards_in_last_column),
        ("shaped_rewards", twins.rewards_on_every_token),
    ],
    laws.a_terminal_score_decays_with_distance: [
        ("shaped_rewards", twins.rewards_length_for_index),
        ("shaped_rewards", twins.rewards_in_last_column),
        ("gae", twins.gae_forgets_lambda),
        ("gae", twins.gae_forgets_gamma_in_the_trace),
    ],
    laws.the_first_ratio_is_exactly_1: [
        ("policy_loss", twins.policy_flipped_sign),
        ("policy_loss", twins.policy_swapped_ratio),
        ("policy_loss", twins.policy_without_gradient),
        ("policy_loss", twins.policy_old_is_new),
        ("token_logprobs", twins.logprobs_not_repeatable),
    ],
    laws.clipping_never_lowers_the_policy_loss: [
        ("policy_loss", twins.policy_takes_the_smaller),
        ("policy_loss", twins.policy_flipped_sign),
    ],
    laws.clipping_never_lowers_the_value_loss: [
        ("value_loss", twins.value_takes_the_smaller),
        ("value_loss", twins.value_only_clipped),
    ],
    laws.padding_changes_nothing: [
        ("masked_whiten", twins.whiten_ignores_mask),
        ("gae", twins.gae_ignores_mask),
        ("shaped_rewards", twins.rewards_in_last_column),
        ("shaped_rewards", twins.rewards_penalise_padding),
        ("token_mean", twins.token_mean_divides_by_all),
        ("token_mean", twins.token_mean_ignores_mask),
        ("masked_mean", twins.mean_ignores_mask),
        ("masked_mean", twins.mean_divides_by_all),
        ("masked_sum", twins.sum_ignores_mask),
        ("explained_variance", twins.explained_variance_ignores_mask),
    ],
    laws.probabilities_sum_to_1_and_temperature_divides_log_odds: [
        ("token_logprobs", twins.logprobs_unnormalised),
        ("token_logprobs", twins.logprobs_temperature_too_late),
        ("token_logprobs", twins.logprobs_temperature_multiplies),
        ("token_logprobs", twins.logprobs_of_the_next_position),
    ],
    laws.entropy_is_the_mean_surprise: [
        ("token_entropy", twins.entropy_ignores_temperature),
        ("token_entropy", twins.entropy_in_bits),
    ],
    laws.expected_k1_and_k3_are_the_divergence: [
        ("kl_estimate", twins.kl_swapped),
        ("kl_estimate", twins.kl_k3_of_the_inverse_ratio),
    ],
    laws.k3_is_never_negative: [
        ("kl_estimate", twins.kl_k3_cancels),
        ("kl_estimate", twins.kl_k1_for_all),
    ],
    laws.the_controller_pulls_towards_its_target: [
        ("adaptive_kl", twins.controller_flipped),
        ("adaptive_kl", twins.controller_unclipped),
    ],
    laws.shifting_all_scores_changes_no_preference: [
        ("bradley_terry_loss", twins.preference_of_single_scores),
    ],
    laws.equal_scores_cost_ln_2: [
        ("bradley_terry_loss", twins.preference_fixed_margin),
        ("bradley_terry_loss", twins.preference_of_single_scores),
        ("bradley_terry_loss", twins.preference_floored_sigmoid),
    ],
    laws.the_preference_gradient_is_the_probability_of_error: [
        ("bradley_terry_loss", twins.preference_flipped_sign),
        ("bradley_terry_loss", twins.preference_of_single_scores),
        ("bradley_terry_loss", twins.preference_floored_sigmoid),
    ],
    laws.swapping_the_pair_swaps_the_preference: [
        ("bradley_terry_loss", twins.preference_ignored),
        ("bradley_terry_loss", twins.preference_one_sided_margin),
    ],
    laws.one_number_added_to_all_scores_is_added_to_the_ensemble: [
        ("ensemble_score", twins.ensemble_sums),
    ],
    laws.models_that_agree_are_one_and_doubt_never_pays: [
        ("ensemble_score", twins.ensemble_takes_the_best),
        ("ensemble_score", twins.ensemble_sums),
        ("ensemble_score", twins.ensemble_rewards_doubt),
        ("ensemble_score", twins.ensemble_unbiased),
    ],
    laws.moments_add_up_over_parts: [
        ("masked_moments", twins.moments_are_means),
    ],
    laws.two_ranks_whiten_like_one: [
        ("masked_whiten", twins.whiten_on_each_rank),
        ("masked_whiten", twins.whiten_averages_the_ranks),
    ],
    laws.two_ranks_explain_like_one: [
        ("explained_variance", twins.explained_variance_on_each_rank),
    ],
    laws.four_microbatches_have_the_gradient_of_one_batch: [
        ("token_mean", twins.token_mean_of_each_microbatch),
        ("token_mean", twins.token_mean_is_mean_of_means),
        ("token_mean", twins.token_mean_divides_by_all),
    ],
    label_laws.shifting_all_logits_changes_nothing_if_labels_exclude_each_other: [
        ("classification_loss", label_twins.labels_always_independent),
        ("classification_loss", label_twins.labels_without_normaliser),
    ],
    label_laws.equal_logits_cost_ln_n_or_ln_2: [
        ("classification_loss", label_twins.labels_always_independent),
        ("classification_loss", label_twins.labels_summed),
        ("classification_loss", label_twins.labels_averaged),
        ("classification_loss", label_twins.labels_in_bits),
    ],
    label_laws.the_loss_is_least_where_probabilities_equal_the_target: [
        ("classification_loss", label_twins.labels_rounded),
        ("classification_loss", label_twins.labels_smoothed),
        ("classification_loss", label_twins.labels_without_normaliser),
    ],
    label_laws.the_label_gradient_is_probability_minus_target: [
        ("classification_loss", label_twins.labels_squared),
        ("classification_loss", label_twins.labels_floored),
        ("classification_loss", label_twins.labels_summed),
        ("classification_loss", label_twins.labels_in_bits),
    ],
    label_laws.any_split_of_a_batch_has_its_loss_and_gradient: [
        ("classification_loss", label_twins.labels_weights_divided_out),
    ],
    label_laws.a_weight_multiplies_what_its_label_costs: [
        ("classification_loss", label_twins.labels_weights_ignored),
        ("classification_loss", label_twins.labels_weights_normalised),
        ("classification_loss", label_twins.labels_weights_in_another_order),
        ("classification_loss", label_twins.labels_weigh_the_negative_part),
    ],
    label_laws.a_weight_leaves_the_negative_part_alone: [
        ("classification_loss", label_twins.labels_weigh_both_parts),
        ("classification_loss", label_twins.labels_weigh_the_negative_part),
    ],
    label_laws.the_order_of_labels_does_not_matter: [
        ("classification_loss", label_twins.labels_weights_in_another_order),
    ],
    label_laws.balanced_weights_give_exclusive_labels_the_same_say_and_records_a_mean_of_1: [
        ("balanced_weights", label_twins.balance_without_n),
        ("balanced_weights", label_twins.balance_by_the_root),
        ("balanced_weights", label_twins.balance_upside_down),
        ("balanced_weights", label_twins.balance_counts_hard_labels),
    ],
    label_laws.balanced_weights_give_yes_and_no_the_same_say: [
        ("balanced_weights", label_twins.balance_as_if_exclusive),
        ("balanced_weights", label_twins.balance_by_the_share_alone),
        ("balanced_weights", label_twins.balance_upside_down),
        ("balanced_weights", label_twins.balance_counts_hard_labels),
        ("classification_loss", label_twins.labels_weigh_the_negative_part),
    ],
    weak_laws.labels_are_distributions_and_a_tie_stays_a_tie: [
        ("majority_vote", weak_twins.majority_ties_to_the_first),
        ("majority_vote", weak_twins.majority_counts_abstentions),
        ("majority_vote", weak_twins.majority_over_all_sources),
        ("dawid_skene", weak_twins.em_breaks_ties_towards_class_0),
    ],
    weak_laws.an_abstention_changes_nothing: [
        ("majority_vote", weak_twins.majority_counts_abstentions),
        ("majority_vote", weak_twins.majority_over_all_sources),
        ("dawid_skene", weak_twins.em_counts_abstentions),
        ("vote_accuracy", weak_twins.accuracy_counts_abstentions_as_wrong),
        ("vote_accuracy", weak_twins.accuracy_reads_abstentions_as_a_class),
    ],
    weak_laws.permuting_sources_permutes_the_answer: [
        ("dawid_skene", weak_twins.em_favours_early_sources),
    ],
    weak_laws.renaming_the_classes_renames_the_answer: [
        ("majority_vote", weak_twins.majority_ties_to_the_first),
        ("dawid_skene", weak_twins.em_counts_abstentions),
        ("dawid_skene", weak_twins.em_breaks_ties_towards_class_0),
    ],
    weak_laws.turning_a_pair_round_turns_its_label_round_and_no_other: [
        ("dawid_skene", weak_twins.em_prefers_a_place),
        ("dawid_skene", weak_twins.em_breaks_ties_towards_class_0),
        ("dawid_skene", weak_twins.em_counts_abstentions),
    ],
    weak_laws.the_objective_never_falls: [
        ("dawid_skene", weak_twins.em_reports_falling_objective),
    ],
    weak_laws.the_label_is_bayes_rule_with_the_parameters: [
        ("dawid_skene", weak_twins.em_transposes_the_matrix),
        ("dawid_skene", weak_twins.em_forgets_the_prior),
        ("dawid_skene", weak_twins.em_is_the_majority),
    ],
    weak_laws.when_it_settles_accuracies_are_the_smoothed_shares_of_right_votes: [
        ("dawid_skene", weak_twins.em_stops_at_once),
        ("dawid_skene", weak_twins.em_is_the_majority),
        ("vote_accuracy", weak_twins.accuracy_counts_abstentions_as_wrong),
    ],
    weak_laws.one_who_is_always_right_decides: [
        ("dawid_skene", weak_twins.em_is_the_majority),
        ("dawid_skene", weak_twins.em_switches_labels),
    ],
    weak_laws.sources_of_equal_accuracy_decide_by_majority: [
        ("dawid_skene", weak_twins.em_switches_labels),
        ("dawid_skene", weak_twins.em_favours_early_sources),
        ("dawid_skene", weak_twins.em_counts_abstentions),
    ],
    weak_laws.truth_gives_the_share_of_right_votes: [
        ("vote_accuracy", weak_twins.accuracy_counts_abstentions_as_wrong),
        ("vote_accuracy", weak_twins.accuracy_reads_abstentions_as_a_class),
    ],
    weak_laws.conflict_is_part_of_overlap_and_overlap_of_coverage: [
        ("vote_shares", weak_twins.shares_of_all_who_vote),
        ("vote_shares", weak_twins.shares_meet_themselves),
        ("vote_shares", weak_twins.shares_conflict_with_abstentions),
    ],
}

SOUND = {"gae": twins.gae_correct, "shaped_rewards": twins.rewards_correct}


def is_law(thing) -> bool:
    return inspect.isfunction(thing) and list(inspect.signature(thing).parameters) == ["f", "seed"]


@pytest.mark.parametrize("law", CASES, ids=lambda law: law.__name__)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_package_obeys(law, seed):
    law(F, seed)


@pytest.mark.parametrize(
    ("law", "name", "twin"),
    [
        pytest.param(law, *pair, id=f"{law.__name__}-{pair[1].__name__}")
        for law, pairs in CASES.items()
        for pair in pairs
    ],
)
def test_the_law_rejects_its_broken_twin(law, name, twin):
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        law(twins.broken(name, twin), 0)


@pytest.mark.parametrize("name", SOUND)
def test_the_parts_that_twins_are_made_of_are_sound(name):
    for law, pairs in CASES.items():
        if any(name == replaced for replaced, _ in pairs):
            law(twins.broken(name, SOUND[name]), 0)


def test_every_law_has_a_twin_and_every_twin_a_law():
    written = [thing for module in (laws, label_laws, weak_laws) for thing in vars(module).values() if is_law(thing)]
    assert set(written) == set(CASES)
    assert all(CASES.values())
    used = {twin.__name__ for pairs in CASES.values() for _, twin in pairs} | {t.__name__ for t in SOUND.values()}
    defined = {
        name
        for module in (twins, label_twins, weak_twins)
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
    }
    assert used == defined - {"broken"}
