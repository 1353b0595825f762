"""Tests, laid out like trainer/."""
