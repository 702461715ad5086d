"""What happens to a box when its administrators, its site or its power fail: in the lab alone, for it hurts."""
