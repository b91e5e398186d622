"""Memories in worlds that are not text, and beside other libraries."""
