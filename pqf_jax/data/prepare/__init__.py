"""Prepares data sets from their original archives."""
