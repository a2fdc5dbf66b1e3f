"""What was made elsewhere, made again on a running Steelyard server: exports are read, checked, and sent over HTTP.

`export.py` knows files and no server, `remote.py` a server and no files; `openai_jobs.py` brings both together.
"""
