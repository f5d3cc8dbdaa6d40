"""Splitting layers into thinner ones: which can be, what that saves and costs, and the nodes that do it."""
