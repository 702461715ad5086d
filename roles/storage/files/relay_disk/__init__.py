"""What knows the disks of a relay box: finds, plans, installs, opens, watches, replaces, rescues.

Only the standard library; it runs from the stick, on the box, and in tests on any machine with Python 3.11 or newer.
"""
