"""Why a bar is missed; written by hand, and printed on the page beside the figure."""

from tests.benchmarks.ledger import MEAN
from tests.benchmarks.rivals.contest import COMBINED

# (section, work, rule, reference) of a row that misses its bar: the reason.
REASONS: dict[tuple[str, str, str, str], str] = {
    ("compiled", "compiled step, tiny (inductor)", MEAN, COMBINED): (
        "graphs and bytecode are the same; what differs is what Dynamo guards on "
        "before each call: the rule's object, the code that was written for it, fwd "
        "and bwd, and whether forward mode is active: see the row with the lines of "
        "guards"
    ),
}
