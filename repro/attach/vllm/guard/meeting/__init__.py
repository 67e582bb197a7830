"""How the processes of a server exchange data: by torch's store, and by memory that an engine shares with its workers.

The ranks also vote through the store.
"""
