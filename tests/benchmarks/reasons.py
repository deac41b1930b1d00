"""Why a bar is missed; written by hand, and printed on the page beside the figure."""

from tests.benchmarks.curvature import FASTEST, LEANEST, SECTION, WORKLOADS
from tests.benchmarks.ledger import MEAN
from tests.benchmarks.rivals.contest import COMBINED

_FIXED = (
    "a call costs some 0.05 ms more than by hand: trees are laid flat and put back, "
    "tangents are compared with their primals, and the graph is looked through for "
    "operators that are not to be relied on; this workload takes a millisecond or two"
)
_SAME = (
    "the passes are the same as by hand, with the same bytes; what is added is a look "
    "through the graph for operators that are not to be relied on and for captured "
    "parameters, about a microsecond for each of its nodes"
)
_TURNS = (
    "a block is taken one by one, all at once, or forward over reverse: each had its "
    "turns before, and what was the fastest then was not in this run; forward over "
    "reverse pays for what stands in where torch is wrong"
)
_ONE_LAYER = (
    "with one linear layer there is hardly a pass to save, and dual numbers cost a "
    "fixed 0.1 ms: a level to open, functions to watch for what forward mode sees "
    "differently"
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
    (SECTION, "ggnvp", "logistic regression", FASTEST): _ONE_LAYER,
    **{
        (SECTION, "a block of 16", name, LEANEST): (
            "all vectors at once, within the bytes that the caller allows; the fastest "
            "of the others takes them one by one"
        )
        for name in WORKLOADS
    },
    **{
        (SECTION, "ggnvp", name, LEANEST): (
            "tangents go through the model in the run that is pulled back through, and "
            "stay until it is over; that saves one of the passes. A run of forward "
            "mode by itself keeps nothing, and draws other random numbers than the one "
            "of reverse mode"
        )
        for name in WORKLOADS
    },
}
