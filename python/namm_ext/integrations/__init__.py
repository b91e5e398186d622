"""Memories in worlds that are not text."""
