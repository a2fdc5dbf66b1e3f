"""The native kernels, and beside each its twin in PyTorch: the same arithmetic, operation by operation.

`native/` is C++ without torch or Python; `library` finds the form that this processor runs; `steps` are what a plan is
made of; `reference` is the truth that the tests hold the kernels against, and what runs where there is no compiler.
"""
