"""What decides about disks: every mixture of them, without touching one."""
