"""Checks that find a collective which does not match those of the other ranks, before it is issued.

schedule       the schedule of a step: format, hash, comparison
guard          refuse a collective that is not the next entry of the step's schedule
strict, store  compare every collective with the other members first, through a store
"""
