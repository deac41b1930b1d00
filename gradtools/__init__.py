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
from gradtools.rules.identities import (
    clip_grad,
    grad_map,
    reverse_grad,
    scale_grad,
    stop_gradient,
    straight_through,
)
from gradtools.rules.rule import Approximate, Exact, Surrogate

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
    "clip_grad",
    "closure_convert",
    "custom_jvp",
    "custom_vjp",
    "grad_map",
    "gradcheck_policy",
    "is_checking",
    "reverse_grad",
    "scale_grad",
    "stop_gradient",
    "straight_through",
]
__version__ = "0.1.0"

for _name in __all__:  # in tracebacks and pickles they stand where they are found
    globals()[_name].__module__ = __name__
