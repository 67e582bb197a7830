"""What a rank did, from three sources: our witness file (`witness`), the recorder that writes it (`recording`), and the
evidence of other tools (`foreign`).
"""
