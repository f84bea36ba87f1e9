"""Rows of the table of operations, a module a family."""
