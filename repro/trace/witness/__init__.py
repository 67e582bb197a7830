"""The format of a rank's witness file, and the functions that read a witness.

Other functions follow a witness while its rank writes it, shorten a witness for a bundle, and rebuild an earlier state.
"""
