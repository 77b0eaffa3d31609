"""The doctor: is this machine, or this set of ranks, fit to train?"""
