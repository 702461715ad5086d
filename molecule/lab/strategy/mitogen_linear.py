"""Plays in the lab by Mitogen: one Python for each box and play, where Ansible starts one for each task.

A whole box takes a fifth of the time. Boxes of a fleet are played by Ansible alone, and so are updates, pull mode and
lock-outs in the tests, so that both ways are proved.
"""

from ansible.plugins.strategy.linear import StrategyModule as Linear
from ansible_mitogen import affinity
from ansible_mitogen.strategy import StrategyMixin

# Mitogen's own policy ties what a play starts to one processor, and plays start the boxes.
affinity.policy = affinity.Policy()


class StrategyModule(StrategyMixin, Linear):
    """Ansible's own order of tasks, over Mitogen's connections."""
