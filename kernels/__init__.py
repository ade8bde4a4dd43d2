"""Device code and its launchers: one room per operator, with the same file names in each.

Nothing here imports the rest of seal_fast. `reference.py` in each room is the meaning that every backend must
reproduce.
"""
