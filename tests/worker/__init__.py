"""Tests of the worker: real tasks, merging and executor in this process; `pipelines` and `requests` make the input."""
