"""Fuzzing of every reader: `make fuzz`, or `python tests/fuzzing/run.py --help`."""
