"""Second order: products, operators, solvers, implicit differentiation, estimators.

Everything here is composed from derivatives that are public, torch's and those of
rules, and works on any function of torch tensors.
"""
