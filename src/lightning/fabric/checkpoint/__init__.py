"""Checkpoints that cannot be lost: what a committed one contains, and how it comes to be and goes.

* ``checksum``: of a file, by several threads
* ``manifest``: what a committed checkpoint contains, and whether it still does
* ``transaction``: stage, commit: a path holds a whole checkpoint, the old one or the new one, at any time
* ``directory``: many of them, the latest good one, and which are kept
"""
