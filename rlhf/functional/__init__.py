"""The equations of the pipeline as pure functions of tensors: losses, KL estimators, advantages, vote models.

There is no file access, module, device, configuration or process group here. Shapes are checked before arithmetic,
nothing is broadcast silently, and every mask is bool with True = counts.
"""

from rlhf.functional.classify import balanced_weights, classification_loss
from rlhf.functional.kl import adaptive_kl, kl_estimate
from rlhf.functional.logprobs import token_entropy, token_logprobs
from rlhf.functional.masked import explained_variance, masked_mean, masked_moments, masked_sum, masked_whiten
from rlhf.functional.ppo import policy_loss, value_loss
from rlhf.functional.preference import bradley_terry_loss, ensemble_score
from rlhf.functional.reduce import token_mean
from rlhf.functional.returns import gae, shaped_rewards
from rlhf.functional.weak import dawid_skene, majority_vote, vote_accuracy, vote_shares

__all__ = [
    "adaptive_kl",
    "balanced_weights",
    "bradley_terry_loss",
    "classification_loss",
    "dawid_skene",
    "ensemble_score",
    "explained_variance",
    "gae",
    "kl_estimate",
    "majority_vote",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "masked_whiten",
    "policy_loss",
    "shaped_rewards",
    "token_entropy",
    "token_logprobs",
    "token_mean",
    "value_loss",
    "vote_accuracy",
    "vote_shares",
]
