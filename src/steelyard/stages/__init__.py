"""The lifecycle as Python calls, one module per verb: what the command line, jobs and notebooks run.

Stages never call each other; they meet on disk in a checkpoint. They print nothing: progress goes to a callable.
"""
