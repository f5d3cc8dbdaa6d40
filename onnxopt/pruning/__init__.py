"""Removing channels that carry signal: which to remove, what that costs, and fitting what stays to make up for it."""
