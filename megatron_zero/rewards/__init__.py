"""Rewards: extraction and equivalence of mathematical answers, graded in supervised processes.

Deliberately empty: a verifier worker imports this package and must stay light (no torch).
"""
