"""Run the client examples of Triton against a stack: ``python -m tests.triton_examples DIR``."""
