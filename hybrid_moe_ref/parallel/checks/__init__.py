"""Find a collective that does not match the collectives of the other ranks, before it is issued.

schedule       format, hash and compare the schedule of a step
guard          refuse a collective that is not the next entry of the step's schedule
strict, store  compare every collective with the other members first, through a store
"""
