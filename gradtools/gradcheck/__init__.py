"""Does a rule tell the truth: the check that runs on its first call.

This room sees a rule from outside, as functions of its arguments
(:class:`gradtools.lowering.flat.Plan`), and knows nothing of autograd Functions.
"""
