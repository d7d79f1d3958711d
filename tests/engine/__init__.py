"""Tests of the engine: decisions as functions of state, events with tiny pipelines, faults with real processes."""
