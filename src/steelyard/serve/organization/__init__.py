"""Projects, keys, limits, and the log of who changed them: what administrators and the command line do.

Functions over a connection, within a transaction that the caller commits. They know no HTTP.
"""
