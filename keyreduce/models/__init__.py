"""Models: loading them, checking what they hold, and DeltaNet2, which no library ships.

Nothing is imported here: fla takes seconds, and what reads and writes files alone does without it.
"""
