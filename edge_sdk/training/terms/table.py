"""Which fields of a plan have a term, and in what order these act.

The order of gradients: what belongs to the loss, then clipping, then what is no gradient of it."""

from __future__ import annotations

from collections.abc import Callable

from edge_sdk.protocol.messages import Plan
from edge_sdk.training.terms.base import Context, Term, Terms
from edge_sdk.training.terms.clipping import Clipping
from edge_sdk.training.terms.correction import Correction
from edge_sdk.training.terms.distilling import Distilling
from edge_sdk.training.terms.dynamic import Dynamic
from edge_sdk.training.terms.flat import Flat
from edge_sdk.training.terms.labels import LogitAdjustment, MaskAbsent
from edge_sdk.training.terms.narrow import Scaler, StaticNorm
from edge_sdk.training.terms.proximal import Proximal
from edge_sdk.training.terms.pruning import Pruning
from edge_sdk.training.terms.teacher import Taught

# Whether a plan asks for it, and the term.
TERMS: tuple[tuple[Callable[[Plan], object], type[Term]], ...] = (
    (lambda plan: plan.scaler != "none", Scaler),
    (lambda plan: plan.flat, Flat),
    (lambda plan: plan.logit_adjustment, LogitAdjustment),
    (lambda plan: plan.mask_absent, MaskAbsent),
    (lambda plan: plan.distill != "none" and plan.distill_weight, Distilling),
    (lambda plan: plan.teacher, Taught),
    (lambda plan: plan.prox_mu, Proximal),
    (lambda plan: plan.dyn_alpha, Dynamic),
    (lambda plan: plan.clip_value or plan.clip_norm, Clipping),
    (lambda plan: plan.correction, Correction),
    (lambda plan: plan.prune, Pruning),
    (lambda plan: plan.static_norm, StaticNorm),
)


def terms_of(context: Context) -> Terms:
    """The terms of a job's plan. Raises ConfigError for a plan that one of them cannot follow."""
    return Terms([term(context) for is_asked, term in TERMS if is_asked(context.plan)])
