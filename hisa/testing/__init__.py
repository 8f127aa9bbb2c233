"""Checks for the tests of your own integration, and inputs to feed it."""
