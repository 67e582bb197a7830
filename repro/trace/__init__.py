"""What a rank did: this project's witness file (`witness`), its recorder (`recording`), and records of other tools'
evidence (`foreign`).
"""
