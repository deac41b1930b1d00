"""Four rules, each in every way in which an expert would write it for torch.

The spellings of a rule do the same arithmetic, in the same order and out of place, so
that what differs between them is what the layer around it costs.
"""

from tests.benchmarks.rivals.affine import AFFINE
from tests.benchmarks.rivals.contest import TINY, Contest
from tests.benchmarks.rivals.exponential import EXPONENTIAL
from tests.benchmarks.rivals.linear import LINEAR
from tests.benchmarks.rivals.swish import SWISH

__all__ = ["CONTESTS", "TINY", "Contest"]

CONTESTS = {contest.name: contest for contest in (EXPONENTIAL, SWISH, LINEAR, AFFINE)}
