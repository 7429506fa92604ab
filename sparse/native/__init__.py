"""Compile and load the C++ of this package."""
