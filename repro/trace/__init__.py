"""What a rank did: our witness file (`witness`), the recorder that writes this file (`recording`), and the records of
evidence from other tools (`foreign`).
"""
