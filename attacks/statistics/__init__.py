"""Statistics of attacks: estimates with intervals that hold. Knows no model.

Every interval here is tested for coverage by simulation, beside a broken variant that the same
test rejects.
"""

from attacks.statistics.exposure import Exposure, exposure_by_ranking, exposure_by_sample
from attacks.statistics.low_fpr import (
    RocBand,
    TooFewNonMembers,
    pointwise_band,
    simultaneous_band,
    tpr_at_fpr,
)
from attacks.statistics.means import mean_estimate, ratio_estimate
from attacks.statistics.one_run import (
    DEFAULT_GUESS_FRACTIONS,
    OneRunBound,
    canaries_needed,
    one_run_audit,
    one_run_ceiling,
    one_run_epsilon,
    one_run_p_value,
)
from attacks.statistics.permutation import (
    Auc,
    PermutationControl,
    RankStatistic,
    TprAtFpr,
    permutation_control,
)
from attacks.statistics.rates import (
    bonferroni,
    bounded_mean,
    chernoff_interval,
    clopper_pearson,
    holm,
    rate,
    simultaneous_confidence,
)
from attacks.statistics.results import Estimate, Interval
from attacks.statistics.roc import RocCurve, auc, auc_distribution_free, roc_curve
from attacks.statistics.tradeoff import (
    epsilon_delta_roc_ceiling,
    gdp_delta,
    gdp_epsilon,
    tradeoff_gaussian,
)

__all__ = [
    "DEFAULT_GUESS_FRACTIONS",
    "Auc",
    "Estimate",
    "Exposure",
    "Interval",
    "OneRunBound",
    "PermutationControl",
    "RankStatistic",
    "RocBand",
    "RocCurve",
    "TooFewNonMembers",
    "TprAtFpr",
    "auc",
    "auc_distribution_free",
    "bonferroni",
    "bounded_mean",
    "canaries_needed",
    "chernoff_interval",
    "clopper_pearson",
    "epsilon_delta_roc_ceiling",
    "exposure_by_ranking",
    "exposure_by_sample",
    "gdp_delta",
    "gdp_epsilon",
    "holm",
    "mean_estimate",
    "one_run_audit",
    "one_run_ceiling",
    "one_run_epsilon",
    "one_run_p_value",
    "permutation_control",
    "pointwise_band",
    "rate",
    "ratio_estimate",
    "roc_curve",
    "simultaneous_band",
    "simultaneous_confidence",
    "tpr_at_fpr",
    "tradeoff_gaussian",
]
