"""Tests of trainer/metrics."""
