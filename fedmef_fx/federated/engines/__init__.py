"""Where clients run: one after the other in this process, or in processes of their own.

All engines play rounds alike; they differ in how a broadcast reaches a client and its answer comes back.
"""
