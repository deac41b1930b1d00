"""Why a bar is missed; written by hand, and printed on the page beside the figure."""

from tests.benchmarks.curvature import FASTEST, LEANEST, SECTION, WORKLOADS
from tests.benchmarks.ledger import MEAN
from tests.benchmarks.rivals.contest import COMBINED

_FIXED = (
    "a call costs 0.1 to 0.2 ms more than by hand: trees are laid flat and put back, "
    "tangents are compared with their primals, and the graph is looked through for "
    "operators that are not to be relied on; this workload takes a millisecond or two"
)
_SAME = (
    "the passes are the same as by hand, with the same bytes; what is added is a look "
    "through the graph for operators that are not to be relied on and for captured "
    "parameters, about a microsecond for each of its nodes"
)
_VECTORIZED = (
    "forward over reverse, vectorized, takes all vectors through the model at once. It "
    "is faster here, takes more memory (the row with the peak), and is wrong, or "
    "refused, for other operators"
)
_TURNS = (
    "a block is taken one by one or all at once, as was faster before; what it chose "
    "was not always what was faster in this run"
)
_JOBS = ("hvp", "twenty products", "a block of 16", "ggnvp")
# (section, work, rule, reference) of a row that misses its bar: the reason.
REASONS: dict[tuple[str, str, str, str], str] = {
    ("compiled", "compiled step, tiny (inductor)", MEAN, COMBINED): (
        "graphs and bytecode are the same; what differs is what Dynamo guards on "
        "before each call: the rule's object, the code that was written for it, fwd "
        "and bwd, and whether forward mode is active: see the row with the lines of "
        "guards"
    ),
    **{
        (SECTION, job, name, FASTEST): (
            _FIXED if name == "logistic regression" else _SAME
        )
        for job in _JOBS
        for name in WORKLOADS
    },
    **{(SECTION, "a block of 16", name, FASTEST): _TURNS for name in WORKLOADS},
    **{
        (SECTION, "a block of 16", name, FASTEST): _VECTORIZED
        for name in ("perceptron", "transformer", "convnet")
    },
    **{
        (SECTION, "ggnvp", name, LEANEST): (
            "forward mode keeps no graph of the model while it pushes; where it is the "
            "fastest as well, it is the leaner way. It is wrong for some operators "
            "and missing for others"
        )
        for name in WORKLOADS
    },
}
