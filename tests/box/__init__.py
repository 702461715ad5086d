"""What a correct relay box is: the same tests for boxes of the lab and for real ones.

    pytest tests/box --hosts=ansible://relay-0001 --ansible-inventory=inventory/fleet.yml
"""
