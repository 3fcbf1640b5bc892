"""What stands on the disk: files of strangers are read strictly, our own are written whole.

Read reading.py (what every strict reader shares), rows.py (JSON lines, JSON, CSV, and parquet.py;
every fault names file and line), sieve.py (what becomes of malformed rows), folders.py (which files
of a model's folder count), foreign.py (what a folder is that is no model), fingerprint.py (which
weights are the same) and atomic.py (every file operation of a save, one rename a commit). Imports
errors only.
"""
