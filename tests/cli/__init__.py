"""Tests of the command line; `sgld` below is a command run in this process with a fake engine."""
