"""Whether a device computes as a CPU does: `minirlhf selftest`.

tiny.py makes a model and data that are the same to the last bit on every machine, checks.py what is
computed with them, compare.py sets that beside numbers.json, which record.py wrote on a CPU in
float64, and command.py tells what came of it.
"""
