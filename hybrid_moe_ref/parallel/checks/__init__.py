"""Find a collective that does not match the collectives of the other ranks, before it is issued.

schedule       format, hash and compare the schedule of a step
guard          refuse a collective that is not the next entry of the step's schedule
strict, store  before each collective, let its members compare, through a store, what each of them will issue
"""
