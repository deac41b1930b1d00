"""gradtools: functions with derivatives of their own, under every torch transform."""

from gradtools.errors import (
    BackwardContractError,
    CapturedTensorError,
    DefinitionError,
    ForwardContractError,
    GradientMismatchError,
    GradtoolsError,
    TransformError,
)
from gradtools.gradcheck.policy import gradcheck_policy
from gradtools.probing import is_checking
from gradtools.rules.convert import closure_convert
from gradtools.rules.custom_jvp import custom_jvp
from gradtools.rules.custom_vjp import custom_vjp
from gradtools.rules.external import external
from gradtools.rules.identities import (
    clip_grad,
    grad_map,
    reverse_grad,
    scale_grad,
    stop_gradient,
    straight_through,
)
from gradtools.rules.lift import lift
from gradtools.rules.rule import Approximate, Exact, Surrogate
from gradtools.second_order.cg import cg
from gradtools.second_order.check import check_second_order
from gradtools.second_order.curvature import ggnvp_fn, hvp_fn
from gradtools.second_order.directional import jvp, linearize, vjp
from gradtools.second_order.eigenvalues import hessian_eigs
from gradtools.second_order.estimators import hessian_diag, hessian_trace
from gradtools.second_order.functional import functional
from gradtools.second_order.implicit import custom_fixed_point, custom_root
from gradtools.second_order.linear import linear_solve
from gradtools.second_order.products import ggnvp, hvp, vhp
from gradtools.second_order.transforms import (
    grad,
    hessian,
    jacfwd,
    jacrev,
    value_and_grad,
    vmap,
)
from gradtools.spelling import publish as _publish

__all__ = [
    "Approximate",
    "BackwardContractError",
    "CapturedTensorError",
    "DefinitionError",
    "Exact",
    "ForwardContractError",
    "GradientMismatchError",
    "GradtoolsError",
    "Surrogate",
    "TransformError",
    "cg",
    "check_second_order",
    "clip_grad",
    "closure_convert",
    "custom_fixed_point",
    "custom_jvp",
    "custom_root",
    "custom_vjp",
    "external",
    "functional",
    "ggnvp",
    "ggnvp_fn",
    "grad",
    "grad_map",
    "gradcheck_policy",
    "hessian",
    "hessian_diag",
    "hessian_eigs",
    "hessian_trace",
    "hvp",
    "hvp_fn",
    "is_checking",
    "jacfwd",
    "jacrev",
    "jvp",
    "lift",
    "linear_solve",
    "linearize",
    "reverse_grad",
    "scale_grad",
    "stop_gradient",
    "straight_through",
    "value_and_grad",
    "vhp",
    "vjp",
    "vmap",
]
__version__ = "0.1.0"

_publish(__name__, globals())
