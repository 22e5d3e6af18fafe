"""Preparation of data sets from their original archives."""
