"""Tests of what is known of a model before and after it is loaded."""
